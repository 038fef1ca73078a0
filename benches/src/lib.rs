//! How fast: one file per question.
