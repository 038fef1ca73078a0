//! How many tokens a prompt has, before an engine has counted them: learnt for each model.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Tokens in a byte, where nothing has been learnt: 3.3 to 3.5 bytes a token are usual.
const NOMINAL: f64 = 0.29;
/// Weight of a new prompt.
const SHARE: f64 = 0.05;
/// Shorter ones say more of templates than of text.
const LEAST_BYTES: u64 = 256;
/// Models that are kept apart; those beyond are taken as nominal.
const MAX_MODELS: usize = 1_024;

/// Tokens in a byte of the canonical prompt, by model.
#[derive(Debug, Default)]
pub(crate) struct Lengths(BTreeMap<Arc<str>, f64>);

impl Lengths {
    /// The likely number of tokens of a prompt of so many bytes.
    pub(crate) fn tokens(&self, model: &str, bytes: u64) -> u64 {
        let ratio = self.0.get(model).copied().unwrap_or(NOMINAL);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // bodies are bounded
        let tokens = (bytes as f64 * ratio).ceil() as u64;
        tokens.max(1)
    }

    /// An engine counted.
    pub(crate) fn learn(&mut self, model: &Arc<str>, bytes: u64, tokens: u32) {
        if bytes < LEAST_BYTES || tokens == 0 {
            return;
        }
        let sample = f64::from(tokens) / bytes as f64;
        if let Some(ratio) = self.0.get_mut(model) {
            *ratio += SHARE * (sample - *ratio);
        } else if self.0.len() < MAX_MODELS {
            self.0.insert(model.clone(), sample);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_follow_what_engines_count() {
        let model: Arc<str> = "m".into();
        let mut lengths = Lengths::default();
        assert_eq!(lengths.tokens("m", 1_000), 290);
        lengths.learn(&model, 1_000, 250);
        assert_eq!(lengths.tokens("m", 1_000), 250);
        lengths.learn(&model, 100, 100);
        assert_eq!(lengths.tokens("m", 1_000), 250, "too short to say anything");
        (0..200).for_each(|_| lengths.learn(&model, 1_000, 400));
        assert_eq!(lengths.tokens("m", 1_000), 400);
        assert_eq!(lengths.tokens("m", 0), 1);
    }
}
