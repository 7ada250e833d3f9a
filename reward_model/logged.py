"""What reward models log, a line of definition each. No torch: `monitor` is checked against these names when a config is read."""

PAIR_TRAINING_METRICS = {
    "train/accuracy": "Share of the step's pairs, in all micro-batches and processes, whose chosen answer scores higher; ties count half.",
    "train/margin": "Mean chosen score minus rejected score of the same pairs.",
}
PAIR_METRICS = {
    "val/loss": "Mean of -log sigmoid(chosen - rejected) over the questions of the validation split, in nats; margins as in training.",
    "val/accuracy": "Share of validation pairs whose chosen answer scores higher; ties count half.",
    "val/margin": "Mean chosen score minus rejected score over the validation pairs.",
    "val/score_mean": "Mean score over all answers of the validation pairs; a drift that PPO's normalisation removes.",
}
PAIR_MEMBER_METRICS = {
    "val/spread": "Ensembles: standard deviation of the members' chosen minus rejected score, mean over the validation pairs.",
    "val/member_loss": "Ensembles: `val/loss` of a single member, mean over the members.",
    "val/member_accuracy": "Ensembles: `val/accuracy` of a single member, mean over the members.",
}
SCORE_METRICS = {
    "val/loss": "Mean loss per answer over the whole validation split, on the transformed scale.",
    "val/mse": "Mean squared error, in the data's score units.",
    "val/mae": "Mean absolute error, in the data's score units.",
    "val/r2": "1 - squared error / squared error of always predicting the mean training score; above 0 is better than that.",
    "val/pearson": "Linear correlation of predicted and target scores.",
    "val/spearman": "Rank correlation of predicted and target scores.",
    "val/accuracy": "Sign accuracy: share of answers whose predicted and target score are both negative or both not.",
    "val/pair_accuracy": "Share of pairs of answers to one question, of different score, that are ordered rightly; ties count half.",
}
SCORE_MEMBER_METRICS = {
    "val/spread": "Ensembles: standard deviation of the members' predicted scores, mean over the answers, in the data's score units.",
    "val/member_loss": PAIR_MEMBER_METRICS["val/member_loss"],
    "val/member_accuracy": PAIR_MEMBER_METRICS["val/member_accuracy"],
}
