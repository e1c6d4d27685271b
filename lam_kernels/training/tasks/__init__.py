"""The tasks of `python -m lam_kernels train TASK` and `evaluate TASK`: one file each.

A file here is a task; `image_classification.py` is called image-classification. It defines

    SUMMARY                         one line for --help
    add_train_arguments(parser)     options of `train`; parser.epilog may hold examples
    train(args) -> int              exit code; args.argv holds the options as they were typed
    add_evaluate_arguments(parser)
    evaluate(args) -> int

and raises UserError for whatever the caller can put right (one sentence, exit code 2). Its imports
beyond torch and this package are lazy.
"""
