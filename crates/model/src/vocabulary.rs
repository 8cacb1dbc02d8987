//! A model of some of the tokens of another: fewer rows to look up, and fewer logits.

use crate::{Error, Gpt, Model, Result, Site};
use formats::tokenizer::renumber;
use serde_json::{Map, Value};

impl Model {
    /// A model of those tokens, whose ids are listed in rising order; a token's new id is its place in the list. Rows stay as they are
    /// stored.
    ///
    /// # Errors
    /// If an id is not of this model, or the family's configuration cannot say so many.
    pub fn of_tokens(&self, ids: &[u32]) -> Result<Model> {
        if !self.adapters.is_empty() {
            return Err(Error::Asked(
                "merge the adapters first (planish export --merge): they are of all tokens".into(),
            ));
        }
        let below = |last: &u32| (*last as usize) < self.spec.vocab;
        if !ids.is_sorted_by(|a, b| a < b) || !ids.last().is_some_and(below) {
            return Err(Error::Asked(format!(
                "tokens are listed in rising order, each once, below {}, the rows that the model has",
                self.spec.vocab
            )));
        }
        let mut model = self.clone();
        let fields = model.config.fields_mut();
        fields.insert("vocab_size".into(), ids.len().into());
        renumber(fields, &|id| place(ids, id));
        model.spec = (self.family.spec)(&model.config)?;
        if model.spec.vocab != ids.len() {
            return Err(model
                .config
                .error("vocab_size", "is not where this family's configuration says how many tokens there are"));
        }
        model.spec.origin.clone_from(&self.spec.origin);
        let rows: Vec<usize> = ids.iter().map(|id| *id as usize).collect();
        for site in [Site::EMBED, Site::HEAD] {
            if let Some(linear) = model.linears.get_mut(&site) {
                if linear.weight.stored().is_none() {
                    let reason = "its rows are not stored as such, so none can be left out; cut the vocabulary before it is factorized";
                    return Err(Error::Site { site, reason: reason.into() });
                }
                linear.weight = linear.weight.select_rows(&rows);
                let bias = linear.bias.as_ref();
                linear.bias = bias.map(|bias| rows.iter().map(|row| bias[*row]).collect());
            }
        }
        Ok(model)
    }
}

impl Gpt {
    /// The same model with only those of its tokens that are wanted, with what they are merged of and what any text may need
    /// (`Tokenizer::only`).
    ///
    /// # Errors
    /// As [`Model::of_tokens`], and if the tokenizer is of another kind.
    pub fn of_tokens(&self, wanted: &dyn Fn(u32) -> bool) -> Result<Gpt> {
        let mut named = self.ends.clone();
        let configs = [Some(self.model.config.fields()), self.generation.as_ref()];
        configs.into_iter().flatten().for_each(|fields| named.extend(numbered(fields)));
        let stays = |id: u32| wanted(id) || named.contains(&id);
        let (tokenizer, kept) = self.tokenizer.only(&stays, &self.path)?;
        // A tokenizer may have more tokens than the model has rows.
        let rows: Vec<u32> = kept.iter().copied().filter(|id| (*id as usize) < self.model.spec.vocab).collect();
        let mut generation = self.generation.clone();
        if let Some(fields) = &mut generation {
            renumber(fields, &|id| place(&kept, id));
        }
        let ends = self.ends.iter().filter_map(|id| place(&kept, *id)).collect();
        let model = self.model.of_tokens(&rows)?;
        Ok(Gpt { model, tokenizer, ends, generation, kept: Some(kept), ..self.clone() })
    }
}

/// Ids that a configuration names.
fn numbered(fields: &Map<String, Value>) -> Vec<u32> {
    let named = fields.iter().filter(|(name, _)| name.ends_with("_token_id"));
    let ids = named.flat_map(|(_, value)| match value {
        Value::Array(ids) => ids.iter().collect(),
        one => vec![one],
    });
    ids.filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()).collect()
}

/// The new id of a token.
fn place(kept: &[u32], id: u32) -> Option<u32> {
    kept.binary_search(&id).ok().map(|at| at as u32)
}
