//! How the tokens relate inside the last block, beside how they do in the teacher's last (MiniLMv2, arXiv 2012.15828):
//! widths and numbers of heads may differ, and nothing learns along.

use model::{Heads, Spec};
use tensor::{
    Tensor,
    ops::{Relating, relation_gradient},
};

/// Looks at queries, keys and values of the last blocks.
pub(super) struct Relations {
    /// Share of the loss, for the relations of queries, of keys and of values together.
    weight: f32,
    /// The student's last block.
    last: u16,
    /// Parts of the channels of queries, keys and values: as many as the heads of both have in common.
    heads: [usize; 3],
    /// What the teacher's last block read for the batch at hand.
    said: [Tensor; 3],
    /// Which tokens count.
    counts: Vec<bool>,
}

impl Relations {
    pub fn new(weight: f32, student: &Spec, teacher: &Spec) -> Relations {
        let heads = |spec: &Spec| spec.blocks.last().map_or([1; 3], |b| [b.heads, b.kv_heads, b.kv_heads]);
        let (own, other) = (heads(student), heads(teacher));
        let (said, counts) = Default::default();
        Relations {
            weight,
            last: student.layers() - 1,
            heads: [0, 1, 2].map(|i| common(own[i], other[i])),
            said,
            counts,
        }
    }

    pub fn begin(&mut self, targets: &[Option<u32>]) {
        self.counts.clear();
        self.counts.extend(targets.iter().map(Option::is_some));
    }

    /// The teacher's last block read this.
    pub fn hear(&mut self, heads: Heads<'_>) {
        self.said.iter_mut().zip(heads.values).for_each(|(said, values)| said.copy_from(values));
    }

    /// Adds the gradients of `factor` times the divergences of all relations from the teacher's.
    pub fn attended(&self, layer: u16, heads: Heads<'_>, gradients: [&mut Tensor; 3], factor: f32) {
        if layer != self.last {
            return;
        }
        let all = heads.values.into_iter().zip(&self.said).zip(gradients).zip(self.heads);
        for (((own, said), gradient), heads_of_it) in all {
            let how = Relating { rows: heads.rows, counts: &self.counts, heads: heads_of_it };
            relation_gradient(how, own, said, factor * self.weight / 3.0, gradient);
        }
    }
}

/// The greatest common divisor.
fn common(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common(b, a % b) }
}
