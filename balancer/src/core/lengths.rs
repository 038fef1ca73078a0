//! How many tokens prompts have, before an engine has counted them: learnt for each model.

use std::collections::BTreeMap;
use std::sync::Arc;

use forebay_scheduler::length::{Lengths as OfOne, Makeup};

/// Models that are kept apart. At the bound those that the facts do not have any more make room; those beyond
/// are taken as nominal.
const MAX_MODELS: usize = 1_024;

/// What bytes are worth, by model.
#[derive(Debug, Default)]
pub(crate) struct Lengths(BTreeMap<Arc<str>, Box<OfOne>>);

impl Lengths {
    /// What is known of a model's prompts, to be asked without the lock.
    pub(crate) fn of(&self, model: &str) -> OfOne {
        let known = self.0.get(model);
        known.map_or_else(OfOne::default, |known| (**known).clone())
    }

    /// New facts have these models.
    pub(crate) fn follow(&mut self, has: impl Fn(&str) -> bool) {
        if self.0.len() >= MAX_MODELS {
            self.0.retain(|model, _| has(model));
        }
    }

    /// An engine counted.
    pub(crate) fn learn(&mut self, model: &Arc<str>, makeup: &Makeup, tokens: u32) {
        if let Some(known) = self.0.get_mut(model) {
            known.learn(makeup, tokens);
        } else if self.0.len() < MAX_MODELS {
            let mut first = OfOne::default();
            first.learn(makeup, tokens);
            self.0.insert(model.clone(), Box::new(first));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(lengths: &Lengths, model: &str, bytes: u64) -> f64 {
        let makeup = Makeup::of_size(bytes);
        lengths.of(model).predict(&makeup, 0, 0).tokens
    }

    #[test]
    fn lengths_follow_what_engines_count_of_each_model() {
        let mut lengths = Lengths::default();
        let nominal = tokens(&lengths, "m", 1_000);
        (0..200).for_each(|_| lengths.learn(&"m".into(), &Makeup::of_size(1_000), 400));
        let learnt = tokens(&lengths, "m", 2_000);
        assert!((780.0..820.0).contains(&learnt), "{learnt}");
        assert_eq!(tokens(&lengths, "other", 1_000), nominal);
        assert_eq!(tokens(&lengths, "m", 0), 1.0);
    }

    #[test]
    fn models_are_bounded() {
        let mut lengths = Lengths::default();
        for model in 0..MAX_MODELS + 9 {
            lengths.learn(&model.to_string().into(), &Makeup::of_size(1_000), 400);
        }
        assert_eq!(lengths.0.len(), MAX_MODELS);
        lengths.follow(|model| model.len() < 3);
        assert_eq!(lengths.0.len(), 100, "models 0 to 99");
        lengths.follow(|_| false);
        assert_eq!(lengths.0.len(), 100, "there is room");
    }
}
