//! What the parts of Forebay say to each other: ids, units, messages, frames.
