"""From files of rows to tokens and labels: read (`rows`), understand (`formats`), render and label (`render`), store
(`prepared`)."""
