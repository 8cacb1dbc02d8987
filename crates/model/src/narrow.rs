//! A model of some of the channels of another: an ordinary smaller model, in files as in memory.

use crate::{BlockSpec, Error, Model, Result, Role, Site, model::NormWeights};
use std::collections::BTreeMap;
use tensor::{Linear, Tensor, Weight};

/// How wide a model is to be; what is not said stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Widths {
    /// Channels of the residual stream.
    pub dim: Option<usize>,
    /// Neurons of every feed-forward network.
    pub hidden: Option<usize>,
    /// Key and value heads, each with the query heads that read it.
    pub kv_heads: Option<usize>,
}

impl std::str::FromStr for Widths {
    type Err = Error;

    /// Reads `dim=192,hidden=512,kv-heads=2`.
    fn from_str(text: &str) -> Result<Widths> {
        let refuse = |word: &str| {
            Error::Asked(format!("widths are said as dim=192,hidden=512,kv-heads=2, or some of these: not {word:?}"))
        };
        let mut widths = Widths::default();
        for word in text.split(',') {
            let (name, number) = word.split_once('=').ok_or_else(|| refuse(word))?;
            let own = match name.trim() {
                "dim" => &mut widths.dim,
                "hidden" => &mut widths.hidden,
                "kv-heads" => &mut widths.kv_heads,
                _ => return Err(refuse(word)),
            };
            let number = number.trim().parse().ok().filter(|n| *n > 0);
            if own.replace(number.ok_or_else(|| refuse(word))?).is_some() {
                return Err(Error::Asked(format!("{} is said twice", name.trim())));
            }
        }
        Ok(widths)
    }
}

/// Channels that stay, each list in rising order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Channels {
    /// Of the residual stream.
    pub dim: Vec<usize>,
    /// Neurons, for each block.
    pub hidden: Vec<Vec<usize>>,
    /// Key and value heads, for each block.
    pub kv_heads: Vec<Vec<usize>>,
}

impl Channels {
    /// All of a model.
    pub fn all(model: &Model) -> Channels {
        let each = |count: fn(&BlockSpec) -> usize| model.spec.blocks.iter().map(|b| (0..count(b)).collect()).collect();
        Channels { dim: (0..model.spec.dim).collect(), hidden: each(|b| b.hidden), kv_heads: each(|b| b.kv_heads) }
    }

    /// Those whose weights are the largest: of a channel the squares of all that reads or writes it, of a neuron and a
    /// group of heads the product of what goes in and what comes out.
    ///
    /// # Errors
    /// If the model is not so wide.
    pub fn largest(model: &Model, widths: Widths) -> Result<Channels> {
        let spec = &model.spec;
        let mut dim = vec![0.0; spec.dim];
        let (mut hidden, mut kv_heads) = (Vec::new(), Vec::new());
        let mut add = |sums: &[f64]| dim.iter_mut().zip(sums).for_each(|(d, s)| *d += s);
        for role in [Role::Embed, Role::Position, Role::Head] {
            if let Some(linear) = model.linears.get(&Site { layer: None, role }) {
                add(&squares(&linear.weight.to_tensor())[1]);
            }
        }
        for (layer, b) in (0..spec.layers()).zip(&spec.blocks) {
            let of = |role: Role| -> Result<[Vec<f64>; 2]> {
                if spec.shape(Site::of(layer, role)).is_none() {
                    return Ok([vec![1.0; b.hidden], Vec::new()]);
                }
                Ok(squares(&model.linear(Site::of(layer, role))?.weight.to_tensor()))
            };
            let [gate, up, down] = [of(Role::Gate)?, of(Role::Up)?, of(Role::Down)?];
            let [q, k, v, o] = [of(Role::Q)?, of(Role::K)?, of(Role::V)?, of(Role::O)?];
            [&gate, &up, &q, &k, &v].into_iter().for_each(|reads| add(&reads[1]));
            [&down, &o].into_iter().for_each(|writes| add(&writes[0]));
            let neuron = |i: usize| gate[0][i] * up[0][i] * down[1][i];
            hidden.push(largest("hidden", (0..b.hidden).map(neuron).collect(), widths.hidden)?);
            let (own, all) = (b.head_dim, b.head_dim * (b.heads / b.kv_heads));
            let sum = |x: &[f64], group: usize, size: usize| x[group * size..(group + 1) * size].iter().sum::<f64>();
            let group = |g: usize| sum(&q[0], g, all) * sum(&k[0], g, own) + sum(&v[0], g, own) * sum(&o[1], g, all);
            kv_heads.push(largest("kv-heads", (0..b.kv_heads).map(group).collect(), widths.kv_heads)?);
        }
        Ok(Channels { dim: largest("dim", dim, widths.dim)?, hidden, kv_heads })
    }
}

/// Sums of squares of every row and of every column.
fn squares(x: &Tensor) -> [Vec<f64>; 2] {
    let (mut rows, mut cols) = (vec![0.0; x.rows()], vec![0.0; x.cols()]);
    for (row, sum) in rows.iter_mut().enumerate() {
        for (value, col) in x.row(row).iter().zip(&mut cols) {
            let square = f64::from(*value).powi(2);
            *sum += square;
            *col += square;
        }
    }
    [rows, cols]
}

/// The numbers of the largest, in rising order; all where none is asked for.
fn largest(what: &str, of: Vec<f64>, count: Option<usize>) -> Result<Vec<usize>> {
    let count = count.unwrap_or(of.len());
    if count > of.len() {
        return Err(Error::Asked(format!("{what}={count}: the model has {}", of.len())));
    }
    let mut order: Vec<usize> = (0..of.len()).collect();
    order.sort_by(|a, b| of[*b].total_cmp(&of[*a]));
    order.truncate(count);
    order.sort_unstable();
    Ok(order)
}

impl Model {
    /// A model of some of the channels. Weights on grids become floats, and its configuration says the new widths.
    ///
    /// # Errors
    /// If the family's configuration cannot say them, or a list is not in rising order of what the model has.
    pub fn of_channels(&self, channels: &Channels) -> Result<Model> {
        let spec = &self.spec;
        if !self.adapters.is_empty() {
            return Err(Error::Asked(
                "merge the adapters first (planish export --merge): they are of the old widths".into(),
            ));
        }
        let rising = |list: &[usize], below: usize| {
            !list.is_empty() && list.is_sorted_by(|a, b| a < b) && list.last().is_none_or(|last| *last < below)
        };
        let each = |lists: &[Vec<usize>], below: &dyn Fn(usize) -> usize| {
            lists.len() == spec.blocks.len() && lists.iter().enumerate().all(|(i, list)| rising(list, below(i)))
        };
        if !rising(&channels.dim, spec.dim)
            || !each(&channels.hidden, &|i| spec.blocks[i].hidden)
            || !each(&channels.kv_heads, &|i| spec.blocks[i].kv_heads)
        {
            return Err(Error::Asked("channels are listed in rising order, some for each block".into()));
        }
        let same = |counts: Vec<usize>, what: &str| match counts.windows(2).all(|pair| pair[0] == pair[1]) {
            true => Ok(counts.first().copied()),
            false => Err(Error::Asked(format!("{what} differ from block to block, which config.json cannot say"))),
        };
        let mut model = self.shell(Widths {
            dim: Some(channels.dim.len()),
            hidden: same(channels.hidden.iter().map(Vec::len).collect(), "widths of feed-forward networks")?,
            kv_heads: same(channels.kv_heads.iter().map(Vec::len).collect(), "numbers of heads")?,
        })?;
        for (site, linear) in &self.linears {
            let [rows, cols] = self.stay(*site, channels);
            let values = linear.weight.to_tensor();
            let take = |row: usize| cols.iter().map(move |col| (row, *col));
            let kept = rows.iter().flat_map(|row| take(*row)).map(|(row, col)| values.row(row)[col]).collect();
            let weight = Weight::from_tensor(Tensor::from_vec(rows.len(), cols.len(), kept));
            // Codes would be rounded a second time, and holes are no longer as many in each row.
            let weight = match linear.weight.storage() {
                coded if coded.is_coded() => weight,
                floats => Weight::encode(&weight.to_tensor(), floats.dense(), None)
                    .map_err(|e| Error::Site { site: *site, reason: e.to_string() })?,
            };
            let bias = linear.bias.as_ref().map(|bias| rows.iter().map(|row| bias[*row]).collect());
            model.linears.insert(*site, Linear::with_bias(weight, bias));
        }
        for (site, norm) in &self.norms {
            let [_, cols] = self.stay(*site, channels);
            let some = |x: &Vec<f32>| cols.iter().map(|col| x[*col]).collect();
            model.norms.insert(*site, NormWeights { scale: some(&norm.scale), shift: norm.shift.as_ref().map(some) });
        }
        Ok(model)
    }

    /// Rows and columns of a site that stay.
    fn stay(&self, site: Site, channels: &Channels) -> [Vec<usize>; 2] {
        let [rows, cols] = self.spec.shape(site).unwrap_or_default();
        let (dim, layer) = (|| channels.dim.clone(), usize::from(site.layer.unwrap_or_default()));
        let heads = |each: usize| -> Vec<usize> {
            channels.kv_heads[layer].iter().flat_map(|group| group * each..(group + 1) * each).collect()
        };
        let own = self.spec.blocks[layer].head_dim;
        let all = own * (self.spec.blocks[layer].heads / self.spec.blocks[layer].kv_heads);
        match site.role {
            Role::Q => [heads(all), dim()],
            Role::K | Role::V => [heads(own), dim()],
            Role::O => [dim(), heads(all)],
            Role::Gate | Role::Up => [channels.hidden[layer].clone(), dim()],
            Role::Down => [dim(), channels.hidden[layer].clone()],
            Role::QNorm | Role::KNorm => [(0..rows).collect(), (0..cols).collect()],
            _ => [(0..rows).collect(), dim()],
        }
    }

    /// A model of these widths without any weights: its configuration says them, and its spec is what that makes of it.
    ///
    /// # Errors
    /// If the family's configuration cannot say them.
    pub fn shell(&self, widths: Widths) -> Result<Model> {
        if self.is_factored() {
            return Err(Error::Asked("channels are taken away before matrices are factorized, not after it".into()));
        }
        let mut model = Model { linears: BTreeMap::new(), norms: BTreeMap::new(), ..self.clone() };
        let before = &self.spec.blocks[0];
        let dim = widths.dim.unwrap_or(self.spec.dim);
        let hidden = widths.hidden.unwrap_or(before.hidden);
        let kv_heads = widths.kv_heads.unwrap_or(before.kv_heads);
        let heads = kv_heads * (before.heads / before.kv_heads);
        let fields = model.config.fields_mut();
        let gpt2 = fields.contains_key("n_embd");
        let names = if gpt2 {
            ["n_embd", "n_inner", "n_head"]
        } else {
            ["hidden_size", "intermediate_size", "num_attention_heads"]
        };
        for (name, value) in names.into_iter().zip([dim, hidden, heads]) {
            fields.insert(name.into(), value.into());
        }
        if !gpt2 {
            // Where they are left out they follow from the others, which may change alone.
            fields.insert("num_key_value_heads".into(), kv_heads.into());
            fields.insert("head_dim".into(), before.head_dim.into());
        }
        let mut made = (self.family.spec)(&model.config)?;
        let fits = made.dim == dim
            && made.blocks.iter().zip(&self.spec.blocks).all(|(new, old)| {
                [new.hidden, new.kv_heads, new.heads] == [hidden, kv_heads, heads]
                    && (new.head_dim, new.window, new.rope, new.score_scale)
                        == (old.head_dim, old.window, old.rope, old.score_scale)
            })
            && made.ropes == self.spec.ropes;
        if !fits {
            return Err(Error::Asked(format!(
                "the configuration of {} cannot say {} channels in {heads} heads of {}: there the width of heads follows from both; take as many channels of each away",
                self.family.name, dim, before.head_dim
            )));
        }
        made.origin.clone_from(&self.spec.origin);
        model.spec = made;
        Ok(model)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_are_read_and_what_cannot_be_is_told() {
        let read = |text: &str| text.parse::<Widths>();
        let widths = read("dim=192, kv-heads=2").unwrap();
        assert_eq!(widths, Widths { dim: Some(192), hidden: None, kv_heads: Some(2) });
        for wrong in ["", "dim", "dim=0", "width=3", "dim=-1"] {
            assert!(read(wrong).unwrap_err().to_string().contains("dim=192"), "{wrong}");
        }
        assert!(read("dim=1,dim=2").unwrap_err().to_string().contains("twice"));
    }
}
