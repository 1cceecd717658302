"""The trainer: what runs in the pods of a FineTuneJob. Knows torch, trl and peft; never talks to Kubernetes."""
