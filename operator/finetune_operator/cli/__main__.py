from finetune_operator.cli import main

main(prog_name="finetune")
