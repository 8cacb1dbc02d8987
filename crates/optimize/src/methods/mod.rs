//! Methods: one file each, one line in [`METHODS`].
//!
//! No method loops over layers: the walker ([`crate::walk`]) calls one matrix by matrix or block by block, or the model is
//! taught whole ([`crate::heal`]).

mod autoround;
mod awq;
mod distill;
mod gptaq;
mod gptq;
mod hqq;
mod imatrix;
mod kmeans;
mod lqer;
pub mod prune;
mod qat;
mod rotate;
mod rtn;
mod smoothquant;
mod spectrum;
mod svd;

pub use prune::{Cut, Vocabulary};
pub use rotate::Rotation;

use crate::{Error, Needs, Result, Stats, blocks::BlockRewrite, heal::Healing};
use model::{Model, Site, Spec};
use serde::de::DeserializeOwned;
use tensor::{Storage, Tensor, Weight};

/// One entry of the table: what help, documentation and recipes need.
pub struct Method {
    /// Its name in recipes and on the command line.
    pub name: &'static str,
    /// One sentence.
    pub about: &'static str,
    /// Where it is described.
    pub paper: &'static str,
    /// What it costs.
    pub cost: &'static str,
    /// Reads its options.
    pub build: fn(toml::Table) -> Result<Plan>,
}

/// What a method does to a model.
pub enum Plan {
    /// It rewrites each matrix by itself.
    EachMatrix(Box<dyn Rewrite>),
    /// It rewrites the matrices of a block together.
    EachBlock(Box<dyn BlockRewrite>),
    /// It brings the model to another basis and stores nothing anew.
    Rotated(Rotation),
    /// It takes blocks or channels out of the model.
    Cut(Cut),
    /// It leaves tokens out.
    Vocabulary(Vocabulary),
    /// It teaches the model.
    Learned(Box<Healing>),
}

impl Plan {
    /// The method, where it rewrites each matrix by itself, or what it does to those outside of blocks.
    ///
    /// # Errors
    /// If it teaches the model instead: what a site alone costs cannot be asked of it.
    pub fn each_matrix(&self) -> Result<&dyn Rewrite> {
        match self {
            Plan::EachMatrix(method) => Ok(method.as_ref()),
            Plan::EachBlock(method) => Ok(method.outside()),
            Plan::Rotated(_) => Err(Error::Asked(
                "rotations round nothing; put them before a method that does: --method rotate,gptq".into(),
            )),
            Plan::Cut(_) => Err(Error::Asked(
                "layers and channels are removed whole, which rounds nothing; it is a step before one that does".into(),
            )),
            Plan::Vocabulary(_) => Err(Error::Asked(
                "leaving tokens out rounds nothing; it is a step before one that does".into(),
            )),
            Plan::Learned(_) => Err(Error::Asked(
                "storages are chosen with a method that treats each matrix by itself; choose them with --method gptq, and \
                 put the step that teaches before it, or in its place, in the recipe for `planish run`"
                    .into(),
            )),
        }
    }

    /// What it must know of the inputs of matrices.
    pub fn needs(&self) -> Needs {
        match self {
            Plan::EachMatrix(method) => method.needs(),
            Plan::EachBlock(method) => {
                let (outside, first) = (method.outside().needs(), method.first().needs());
                Needs {
                    gram: outside.gram || first.gram,
                    squares: outside.squares || first.squares,
                    shift: outside.shift || first.shift,
                    peak: outside.peak || first.peak,
                    outputs: true,
                    gradients: outside.gradients || first.gradients,
                    slopes: outside.slopes || first.slopes,
                    taylor: outside.taylor || first.taylor,
                }
            }
            Plan::Rotated(_) | Plan::Cut(_) | Plan::Vocabulary(_) | Plan::Learned(_) => Needs::default(),
        }
    }

    /// The storage that a recipe gives this step where another one rounds after it, if it is of use there.
    pub fn storage_before_others(&self) -> Option<&'static str> {
        match self {
            Plan::Rotated(_) | Plan::Cut(_) | Plan::Vocabulary(_) | Plan::Learned(_) => Some("keep"),
            Plan::EachMatrix(method) => method.balances_for_others().then_some("f32"),
            Plan::EachBlock(_) => None,
        }
    }

    /// The model without its weights as this makes it, where that is another shape.
    ///
    /// # Errors
    /// If the family's configuration cannot say it.
    pub fn shell(&self, model: &Model) -> Result<Option<Model>> {
        match self {
            Plan::EachMatrix(method) => method.shell(model),
            Plan::Cut(cut) => cut.shell(model).map(Some),
            _ => Ok(None),
        }
    }

    /// The method, where it rewrites the matrices of a block together.
    pub fn each_block(&self) -> Option<&dyn BlockRewrite> {
        match self {
            Plan::EachBlock(method) => Some(method.as_ref()),
            _ => None,
        }
    }
}

/// A method that rewrites one matrix.
pub trait Rewrite: Send + Sync {
    /// What it must know of the inputs.
    fn needs(&self) -> Needs;

    /// Stores a matrix anew.
    ///
    /// # Errors
    /// If the storage cannot hold it or the statistics are of no use.
    fn matrix(&self, site: Site, weight: &Tensor, storage: Storage, stats: &Stats) -> Result<Weight>;

    /// Does it change a matrix that is to be stored as floats, too?
    fn changes_floats(&self) -> bool {
        false
    }

    /// A method that must have seen every matrix before it changes any: `look` shows it all of them, with their statistics, to
    /// what changes none. The one that is returned goes on in its place.
    ///
    /// # Errors
    /// What `look` says, or if the statistics are of no use.
    fn prepare(
        &self,
        _: &Model,
        _look: &mut dyn FnMut(&dyn Rewrite) -> Result<()>,
    ) -> Result<Option<Box<dyn Rewrite>>> {
        Ok(None)
    }

    /// [`Rewrite::matrix`] where it counts what the matrix is for in a model of that shape.
    ///
    /// # Errors
    /// As there.
    fn matrix_of(&self, _: &Spec, site: Site, weight: &Tensor, storage: Storage, stats: &Stats) -> Result<Weight> {
        self.matrix(site, weight, storage, stats)
    }

    /// The model without its weights as it will be, where its shape will be another ([`Rewrite::cut`]).
    ///
    /// # Errors
    /// If the family's configuration cannot say it.
    fn shell(&self, _: &Model) -> Result<Option<Model>> {
        Ok(None)
    }

    /// When all matrices are done: the model without what they no longer read.
    ///
    /// # Errors
    /// As [`Rewrite::shell`].
    fn cut(&self, _: &Model) -> Result<Option<Model>> {
        Ok(None)
    }

    /// What a matrix of a shape becomes where that is the product of two.
    fn factors(&self, _site: Site, _shape: [usize; 2], _storage: Storage) -> Option<Factors> {
        None
    }

    /// Is what [`Rewrite::balance`] does of use before another method rounds?
    fn balances_for_others(&self) -> bool {
        false
    }

    /// What the inputs of matrices that read one norm are to be divided by, and their columns multiplied by, before they are
    /// stored: the norm takes it over, so the model computes the same. `None` leaves them.
    ///
    /// # Errors
    /// If the statistics are of no use.
    fn balance(&self, _stats: &Stats, _matrices: &[(Site, Tensor, Storage)]) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }
}

/// A matrix that is the product of two, before it is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Factors {
    /// Columns of one, rows of the other.
    pub rank: usize,
    /// How they are stored, as far as their rows divide into its blocks.
    pub storage: Storage,
    /// How what they leave is stored, where that is anything.
    pub rest: Option<Storage>,
}

impl Factors {
    /// Bytes for a matrix of that shape.
    pub fn bytes(self, [rows, cols]: [usize; 2]) -> usize {
        let up = self.outputs().row_bytes(self.rank) * rows;
        up + self.storage.row_bytes(cols) * self.rank + self.rest.map_or(0, |rest| rest.row_bytes(cols) * rows)
    }

    /// How the factor of the outputs is stored, whose rows are as long as the rank.
    pub fn outputs(self) -> Storage {
        model::save::fallback(self.storage, self.rank)
    }
}

/// The method that heals what an earlier step broke.
pub const HEALS: &str = "distill";

/// Every method.
pub static METHODS: &[&Method] = &[
    &rtn::RTN,
    &hqq::HQQ,
    &rotate::ROTATE,
    &imatrix::IMATRIX,
    &awq::AWQ,
    &smoothquant::SMOOTHQUANT,
    &gptq::GPTQ,
    &gptaq::GPTAQ,
    &autoround::AUTOROUND,
    &lqer::LQER,
    &kmeans::KMEANS,
    &svd::SVD,
    &svd::ASVD,
    &svd::SVD_LLM,
    &svd::GFWSVD,
    &prune::MAGNITUDE,
    &prune::WANDA,
    &prune::SPARSEGPT,
    &prune::TAYLOR,
    &prune::FISHER,
    &prune::INFLUENCE,
    &prune::WITHOUT,
    &prune::SLICEGPT,
    &prune::UNUSED,
    &qat::QAT,
    &distill::DISTILL,
];

/// The method of that name.
///
/// # Errors
/// If there is none; the message lists what there is.
pub fn find(name: &str) -> Result<&'static Method> {
    METHODS.iter().copied().find(|m| m.name == name).ok_or_else(|| {
        let names: Vec<_> = METHODS.iter().map(|m| m.name).collect();
        Error::Recipe(format!("no method is called {name:?}; there are {}", names.join(", ")))
    })
}

/// Reads the options of a method; an unknown one is an error that lists those that exist.
fn options<T: DeserializeOwned>(method: &str, table: toml::Table) -> Result<T> {
    table.try_into().map_err(|e: toml::de::Error| Error::Options { method: method.into(), reason: e.message().into() })
}

/// Wraps the complaint of a storage about a matrix.
fn at(site: Site) -> impl Fn(tensor::WeightError) -> Error {
    move |e| Error::Site {
        site,
        reason: format!("{e}; choose another storage for it with --override '{site}=q8_0' or 'keep'"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::{grid::Grid, ops, ops::Gram};

    fn wave(rows: usize, cols: usize, seed: u64) -> Tensor {
        let value = |i: usize| {
            let u = |k: u64| model::uniform(seed, 3 * i as u64 + k) - 0.5;
            (u(0) + u(1) + u(2)) as f32
        };
        Tensor::from_vec(rows, cols, (0..rows * cols).map(value).collect())
    }

    /// Inputs whose channels hang together, as those of real models do.
    fn inputs(rows: usize, cols: usize) -> Tensor {
        ops::matmul(&wave(rows, cols / 4, 5), &Weight::from_tensor(wave(cols, cols / 4, 6)))
    }

    fn error(x: &Tensor, w: &Tensor, q: &Weight) -> f32 {
        let (a, b) = (ops::matmul(x, &Weight::from_tensor(w.clone())), ops::matmul(x, q));
        a.as_slice().iter().zip(b.as_slice()).map(|(a, b)| (a - b) * (a - b)).sum()
    }

    #[test]
    fn every_method_keeps_the_shape_repeats_itself_and_is_no_worse_than_rounding() {
        let (w, x) = (wave(24, 256, 1), inputs(400, 256));
        let mut gram = Gram::new(256);
        gram.add(&x);
        let stats = Stats { gram: Some(gram), peak: Some(ops::absolute_maxima(&x)), ..Stats::default() };
        let site = Site::of(0, model::Role::Up);
        let mut storages: Vec<Storage> = Grid::GGUF.iter().map(|g| Storage::Grid(*g)).collect();
        storages.extend(
            ["int3g64", "int2g32a", "int4g128", "int4g64z", "int8", "nf4", "fp8_e4m3"]
                .map(|n| Storage::parse(n).unwrap()),
        );
        for storage in storages {
            let nearest = error(&x, &w, &Weight::encode(&w, storage, None).unwrap());
            for method in METHODS {
                // What autoround does to a block is tested beside it; what it does outside of blocks, here.
                let plan = (method.build)(toml::Table::new()).unwrap();
                // What takes numbers away is tested beside it too.
                let Some(m) = plan.each_matrix().ok().filter(|m| !m.changes_floats()) else { continue };
                let q = m.matrix(site, &w, storage, &stats).unwrap();
                assert_eq!((q.rows(), q.cols(), q.storage()), (24, 256, storage), "{}", method.name);
                assert_eq!(q.bytes()[..], m.matrix(site, &w, storage, &stats).unwrap().bytes()[..], "{}", method.name);
                let ratio = error(&x, &w, &q) / nearest;
                println!("{} {storage}: {ratio:.3} of rounding's error", method.name);
                let most = match method.name {
                    // It weighs errors in another norm.
                    "hqq" => 1.5,
                    // It weighs single columns, which are not all that counts.
                    "awq" | "imatrix" => 1.05,
                    // It changes what is rounded, which the walker does before it asks for this.
                    "smoothquant" => 1.0001,
                    _ => {
                        if m.needs().data() {
                            0.9
                        } else {
                            1.0001
                        }
                    }
                };
                assert!(ratio < most, "{} {storage}: {ratio}", method.name);
            }
        }
    }

    #[test]
    fn a_typo_is_an_error_that_lists_the_options() {
        for method in METHODS {
            let e =
                (method.build)(toml::Table::from_iter([("dampin".to_string(), 1.into())])).err().unwrap().to_string();
            assert!(e.contains(method.name) && e.contains("unknown field"), "{e}");
        }
        assert!(find("gtpq").err().unwrap().to_string().contains("rtn, hqq, rotate, imatrix"));
    }
}
