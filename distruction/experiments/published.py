"""The paper's Tables 1 to 3: mean and standard deviation (``None`` where none is printed), in percent.

The baselines' numbers are those of Foster, Schoepf, Brintrup 2024 (arXiv 2308.07707). The data set is the caption's, as
the paper's text disagrees. MIA is the entropy attack; D_r and D_f are unweighted means of batch accuracies.
"""

Value = tuple[float, float | None]

BATCH_SIZE = {"full-class": 64, "sub-class": 64, "random": 128}
"""Images in a batch whose accuracies the published numbers average."""

DATA = {"full-class": "CIFAR-100", "sub-class": "CIFAR-20", "random": "CIFAR-10"}

TABLES: dict[str, dict[str, dict[str, Value]]] = {
    "full-class": {
        "retain": {
            "baseline": (88.88, 0.0),
            "retrain": (90.07, 0.09),
            "finetune": (80.82, 1.37),
            "teacher": (87.46, 0.53),
            "unsir": (88.47, 0.89),
            "amnesiac": (87.92, 0.89),
            "ssd": (88.90, 0.0),
            "distruction": (88.86, 0.0),
        },
        "forget": {
            "baseline": (94.70, 0.0),
            "retrain": (0.0, 0.0),
            "finetune": (0.46, 0.72),
            "teacher": (4.20, 5.24),
            "unsir": (65.32, 9.11),
            "amnesiac": (0.0, 0.0),
            "ssd": (0.0, 0.0),
            "distruction": (0.0, 0.0),
        },
        "mia_entropy": {
            "baseline": (94.40, 0.0),
            "retrain": (3.23, 0.50),
            "finetune": (19.00, 0.09),
            "teacher": (0.03, 0.0),
            "unsir": (29.13, 0.06),
            "amnesiac": (1.00, 0.01),
            "ssd": (1.80, 0.0),
            "distruction": (0.0, 0.0),
        },
    },
    "sub-class": {
        "retain": {
            "baseline": (95.73, 0.0),
            "retrain": (94.61, 0.13),
            "finetune": (85.70, 3.05),
            "teacher": (93.60, 0.29),
            "unsir": (93.34, 0.45),
            "amnesiac": (93.47, 0.22),
            "ssd": (95.13, 0.0),
            "distruction": (95.16, None),
        },
        "forget": {
            "baseline": (94.53, 0.0),
            "retrain": (22.26, 8.34),
            "finetune": (6.25, 6.03),
            "teacher": (3.35, 2.89),
            "unsir": (74.93, 10.13),
            "amnesiac": (0.85, 1.71),
            "ssd": (5.12, 0.0),
            "distruction": (0.08, None),
        },
        "mia_entropy": {
            "baseline": (80.40, 0.0),
            "retrain": (3.44, 0.01),
            "finetune": (16.04, 0.03),
            "teacher": (0.02, 0.0),
            "unsir": (27.27, 0.14),
            "amnesiac": (0.78, 0.0),
            "ssd": (5.40, 0.0),
            "distruction": (0.02, None),
        },
    },
    "random": {
        "retain": {
            "baseline": (98.88, 0.0),
            "retrain": (98.61, 0.08),
            "finetune": (97.28, 0.33),
            "teacher": (97.58, 0.36),
            "amnesiac": (97.62, 0.35),
            "ssd": (98.01, 1.56),
            "distruction": (98.353, None),
        },
        "forget": {
            "baseline": (100.0, 0.0),
            "retrain": (98.80, 0.76),
            "finetune": (97.19, 0.98),
            "teacher": (86.75, 3.57),
            "amnesiac": (73.49, 5.11),
            "ssd": (98.07, 2.35),
            "distruction": (96.36, None),
        },
        "mia_entropy": {
            "baseline": (90.76, 0.03),
            "retrain": (91.77, 0.02),
            "finetune": (86.14, 0.02),
            "teacher": (33.53, 0.06),
            "amnesiac": (10.44, 0.05),
            "ssd": (85.54, 0.11),
            "distruction": (0.81, None),
        },
    },
}
"""Scenario to metric to method to (mean, std)."""
