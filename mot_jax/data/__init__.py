"""From text files to training batches.

To train on your own files: `mot data build NAME FILES...` (`build`) makes a corpus of them, and `data.corpus = NAME`
in a config trains on it.

    content         compression, encoding and format of a file, detected from its first bytes
    formats         documents in text, JSON, tables and Parquet
    files           the user's files, and the parts of them that are read independently
    build           a corpus (a TFDS data set) from these documents, by several processes, resumable
    corpora         open a corpus by name: one that was built, the source of Python, or a prepared TFDS data set
    python_source   the source of the running Python as corpora that need no download
    report          `mot data inspect` and `mot data train-tokenizer`
    tokenizers      bytes, tokenizer.json and SentencePiece models
    windows         the tokens of a corpus, packed into windows of context_length, cached on disk
    order           the order of the windows, and why the sequences of a group come from different documents
    permutation     the seeded permutation of an epoch
    objectives      inputs, targets and masks of causal and masked language models
    pipeline        training and validation batches
    text            all of these for one config
    pool            work in several processes, with a progress bar
"""
