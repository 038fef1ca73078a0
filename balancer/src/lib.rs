//! OpenAI-compatible ingress, placement and failover.
