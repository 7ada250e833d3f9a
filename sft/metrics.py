"""What SFT logs, a line of definition each. No torch: `monitor` is checked against these names when a config is read."""

VALIDATION_METRICS = {
    "val/loss": "Cross-entropy per answer token (EOS included) over the whole validation split, in nats; each token weighs alike.",
    "val/perplexity": "exp(val/loss).",
    "val/token_accuracy": "Share of answer tokens that are the model's likeliest token, given the true ones before.",
}
GENERATION_METRICS = {
    "val/bleu": "Corpus BLEU (0-100) of generated answers to a fixed subset of validation questions (`do_compute_metrics`).",
    "val/rouge1_fmeasure": "Mean ROUGE-1 F-measure (0-1) of those answers.",
    "val/rouge2_fmeasure": "Mean ROUGE-2 F-measure (0-1) of those answers.",
    "val/rougeL_fmeasure": "Mean ROUGE-L F-measure (0-1) of those answers.",
    "val/eos_rate": "Share of those answers that end in EOS.",
    "val/answer_tokens": "Mean length of those answers in tokens.",
}
