//! Tokens that the data never uses.

use crate::{
    Error, Recipe, Result,
    data::{self, Document, Purpose, Split},
    evaluate::{self, Evaluation},
    progress::Progress,
    run::{self, Data},
};
use model::Gpt;

/// Which tokens go.
#[derive(Clone, Debug)]
pub struct Vocabulary {
    /// This part of them; all that are never used where none is given.
    pub sparsity: Option<f64>,
}

/// A model of fewer tokens with the data in these.
pub struct Reduced {
    /// The model.
    pub gpt: Gpt,
    /// The same documents, tokens with their new ids.
    pub data: Data,
    /// What went, in a sentence.
    pub told: String,
}

/// Leaves out the tokens that a recipe says; none where it says nothing of them. All steps then work on what is left.
///
/// # Errors
/// If there is no data to know them by, nothing would go, or a text would be cut another way afterwards.
pub fn reduced(gpt: &Gpt, recipe: &Recipe, data: &Data, progress: &dyn Progress) -> Result<Option<Reduced>> {
    let Some(asked) = recipe.vocabulary()? else { return Ok(None) };
    let read = |gpt: &Gpt| -> Result<Option<Vec<Document>>> {
        let separator = recipe.separator.as_deref().unwrap_or(data::SEPARATOR);
        let text = recipe.data.as_ref().filter(|path| path.extension().is_none_or(|end| end != "u16"));
        text.map(|path| data::whole(gpt, path, separator, gpt.model.spec.context, Purpose::Reading)).transpose()
    };
    let parts = [&data.split.calibration, &data.split.solver, &data.split.gate];
    let whole = read(gpt)?;
    let mut used = vec![0u64; gpt.tokenizer.vocab_size().max(gpt.model.spec.vocab)];
    let documents = || parts.into_iter().flatten().chain(whole.iter().flatten());
    documents().flat_map(|d| &d.ids).for_each(|id| used[*id as usize] += 1);
    // Without a file, what the tokens say is the text.
    let texts = match &whole {
        Some(_) => Vec::new(),
        None => spelled(gpt, parts.into_iter().flatten())?,
    };
    let encoded =
        |gpt: &Gpt| texts.iter().map(|text| Ok(gpt.tokenizer.encode(text, true)?)).collect::<Result<Vec<_>>>();
    let before = encoded(gpt)?;
    before.iter().flatten().for_each(|id| used[*id as usize] += 1);

    let small = asked.small(gpt, &used)?;
    let kept = small.kept.as_deref().unwrap_or_default();
    progress.begin("cutting the data into tokens again", 1);
    let after = match &whole {
        Some(_) => read(&small)?.into_iter().flatten().map(|d| d.ids).collect(),
        None => encoded(&small)?,
    };
    let before = whole.map_or(before, |documents| documents.into_iter().map(|d| d.ids).collect());
    let same = |(old, new): (&Vec<u32>, &Vec<u32>)| {
        old.len() == new.len() && old.iter().zip(new).all(|(old, new)| kept.get(*new as usize) == Some(old))
    };
    if let Some(at) = (0..before.len().max(after.len())).find(|i| !before.get(*i).zip(after.get(*i)).is_some_and(same))
    {
        return Err(Error::Asked(format!(
            "document {at} of the data is cut into other tokens with the smaller vocabulary; nothing was written. This is a fault of \
             planish: please report it with the tokenizer"
        )));
    }
    progress.advance(1);
    let moved = |documents: &[Document]| -> Vec<Document> {
        let new = |id: &u32| kept.binary_search(id).map_or(0, |at| at as u32);
        documents.iter().map(|d| Document { ids: d.ids.iter().map(new).collect(), ..d.clone() }).collect()
    };
    let tokens: usize = before.iter().map(Vec::len).sum();
    let told = format!(
        "{} of {} tokens are left; all {tokens} tokens of the data are the same ones as before",
        small.model.spec.vocab, gpt.model.spec.vocab
    );
    let split = Split {
        calibration: moved(&data.split.calibration),
        solver: moved(&data.split.solver),
        gate: moved(&data.split.gate),
    };
    let data = Data { split, about: data.about.clone(), hash: data.hash.clone(), entropy: data.entropy, own: false };
    Ok(Some(Reduced { gpt: small, data, told }))
}

impl Vocabulary {
    fn small(&self, gpt: &Gpt, used: &[u64]) -> Result<Gpt> {
        let all = gpt.model.spec.vocab;
        let unused: Vec<usize> = (0..all).filter(|id| used[*id] == 0).collect();
        // The first of those that are not used stay before others: they were learned as the most frequent ones.
        let with = |more: usize| -> Result<Gpt> {
            let stays = |id: usize| used[id] > 0 || unused[..more].binary_search(&id).is_ok();
            Ok(gpt.of_tokens(&|id| (id as usize) < used.len() && stays(id as usize))?)
        };
        let small = with(0)?;
        let least = small.model.spec.vocab;
        let asked = self.sparsity.map_or(0, |sparsity| ((1.0 - sparsity) * all as f64).round() as usize);
        if least == all || (self.sparsity.is_some() && asked < least) {
            return Err(Error::Asked(format!(
                "the data and special tokens need {least} of the {all} tokens: at most {:.1} % of them can go",
                100.0 * (all - least) as f64 / all as f64
            )));
        }
        let (mut fits, mut beyond) = (0, unused.len() + 1);
        while asked > least && beyond - fits > 1 {
            let middle = fits.midpoint(beyond);
            if with(middle)?.model.spec.vocab <= asked { fits = middle } else { beyond = middle }
        }
        if fits == 0 { Ok(small) } else { with(fits) }
    }
}

/// The texts of documents.
fn spelled<'a>(gpt: &Gpt, documents: impl Iterator<Item = &'a Document>) -> Result<Vec<String>> {
    documents.map(|d| Ok(gpt.tokenizer.decode(&d.ids, true)?)).collect()
}

impl Reduced {
    /// What the original says with all of its tokens, on the documents as they were, and a sentence on how much of that is of those
    /// that went. `left` is its loss among those that are left, in nats per token.
    ///
    /// # Errors
    /// If the documents cannot be scored.
    pub fn before(
        &self,
        whole: &Gpt,
        documents: &[Document],
        left: f64,
        progress: &dyn Progress,
    ) -> Result<(Evaluation, String)> {
        progress.begin("scoring the original with all of its tokens", documents.len() as u64);
        let scores = evaluate::score(&whole.model, documents, progress)?;
        let before = evaluate::summarize(&whole.model, run::file_bytes(&whole.path), documents, &scores);
        let told = format!(
            "quality is told against the original among the tokens that are left; to the others it gives {:.4} % of its probability on \
             the gate's documents",
            100.0 * (1.0 - (left - before.nll).exp())
        );
        Ok((before, told))
    }
}
