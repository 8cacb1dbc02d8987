//! A student learns what a teacher would say (arXiv 1503.02531): one that is there, or what one said before.

mod cached;
mod hidden;
mod policy;
mod relations;
mod teacher;
mod vocabulary;

pub use cached::{About, Cached};
pub use hidden::projections;
pub use policy::Policy;
pub use teacher::Teacher;
pub use vocabulary::{Shared, Translated};

use serde::{Deserialize, Serialize};
use tensor::ops::{Distilling, Likeness};

/// Which divergence of the student from the teacher is made small.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Divergence {
    /// `KL(teacher || student)`.
    #[default]
    Forward,
    /// `KL(student || teacher)`.
    Reverse,
    /// The Jensen-Shannon divergence.
    JensenShannon,
}

impl Divergence {
    /// All, with their names.
    pub const ALL: [(&str, Divergence); 3] = [
        ("forward", Divergence::Forward),
        ("reverse", Divergence::Reverse),
        ("jensen-shannon", Divergence::JensenShannon),
    ];

    fn likeness(self) -> Likeness {
        match self {
            Divergence::Forward => Likeness::Forward,
            Divergence::Reverse => Likeness::Reverse,
            Divergence::JensenShannon => Likeness::Between,
        }
    }
}

/// How a student learns from its teacher.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Guidance {
    /// Which divergence.
    pub divergence: Divergence,
    /// Both distributions are flattened by it.
    pub temperature: f32,
    /// Share of the divergence in the loss; the rest is the likelihood of the text.
    pub share: f32,
    /// Blocks of the teacher that the student began as, where it was made from them.
    pub layers: Option<Vec<u16>>,
    /// Widths that it began with, where they were cut from the teacher's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub widths: Option<String>,
    /// How much more the loss counts what the blocks return beside the teacher's, in parts of its squares.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden: Option<f32>,
    /// How much more the loss counts how tokens relate in the last block beside how they do in the teacher's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relations: Option<f32>,
    /// The likeliest tokens of each prediction that are learned from, where the teacher's are kept in a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// Share of the batches whose texts the student goes on with itself (arXiv 2306.13649).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_policy: Option<f64>,
}

impl Guidance {
    /// # Errors
    /// If a number cannot be.
    pub fn check(&self) -> crate::Result<()> {
        let refuse = |said: String| Err(crate::Error::Asked(said));
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return refuse(format!(
                "--temperature (`temperature` of a recipe) takes a number above 0, not {}",
                self.temperature
            ));
        }
        if !(0.0..=1.0).contains(&self.share) {
            return refuse(format!("--share (`share` of a recipe) takes a number from 0 to 1, not {}", self.share));
        }
        if let Some(share) = self.on_policy.filter(|share| !(0.0..=1.0).contains(share)) {
            return refuse(format!("--on-policy takes a number from 0 to 1, not {share}"));
        }
        for (word, weight) in self.looks() {
            if !(weight >= 0.0 && weight.is_finite()) {
                return refuse(format!("{word} takes a number from 0 on, not {weight}"));
            }
            if self.top_k.is_some() {
                return refuse(format!("{word} looks at the teacher's blocks, which --teacher-cache does not hold"));
            }
        }
        if self.top_k == Some(0) {
            return refuse("--top-k takes a number from 1 on".into());
        }
        if self.top_k.is_some() && self.on_policy.is_some() {
            return refuse(
                "--on-policy needs a teacher that answers what the student says; --teacher-cache holds none".into(),
            );
        }
        if self.top_k.is_some() && self.divergence != Divergence::Forward {
            return refuse(
                "--teacher-cache holds the teacher's likeliest tokens, which --divergence forward learns from".into(),
            );
        }
        Ok(())
    }

    /// Is it `KL(teacher || student)` that is made small?
    pub fn is_forward(&self) -> bool {
        self.divergence == Divergence::Forward
    }

    /// Weights of what is learned from the inside of a teacher, with their words.
    pub fn looks(&self) -> impl Iterator<Item = (&'static str, f32)> {
        let words = [("--hidden", self.hidden), ("--relations", self.relations)];
        words.into_iter().filter_map(|(word, weight)| Some((word, weight?)))
    }

    /// The same for the operation.
    fn how(&self) -> Distilling {
        Distilling { likeness: self.divergence.likeness(), temperature: self.temperature, share: self.share }
    }
}
