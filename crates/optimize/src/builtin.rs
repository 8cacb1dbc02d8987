//! The built-in sample: a GPT of this project's own making and stories whose true entropy is known.

use crate::{
    Result,
    data::{self, Cutting, SEPARATOR, Split},
    run::Data,
};
use formats::atomic;
use model::Gpt;
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Stories of a job on the sample.
const STORIES: u64 = 1200;
/// Stories of evaluation come from seeds that training does not use.
const SEED: u64 = 0x7e57_0000_0000;

/// How long another program may write the same files.
const PATIENCE: Duration = Duration::from_secs(10);

/// Unpacks the sample into the temporary folder; returns its directory.
///
/// # Errors
/// If it cannot be written there.
pub fn unpack() -> Result<PathBuf> {
    let directory = directory();
    std::fs::create_dir_all(&directory).map_err(formats::Error::io(&directory, "make it"))?;
    for (name, bytes) in sample::files() {
        write(&directory.join(name), bytes)?;
    }
    Ok(directory)
}

/// Writes a file of the sample unless it is there; another program that is at it is given time.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let begin = Instant::now();
    while std::fs::read(path).ok().as_deref() != Some(bytes) {
        match atomic::write_bytes(path, bytes) {
            Err(formats::Error::Field { .. }) if begin.elapsed() < PATIENCE => std::thread::sleep(PATIENCE / 500),
            done => return Ok(done?),
        }
    }
    Ok(())
}

/// Its folder's name holds its hash, so that versions do not meet.
fn directory() -> PathBuf {
    let mut hasher = blake3::Hasher::new();
    for (_, bytes) in sample::files() {
        hasher.update(bytes);
    }
    std::env::temp_dir().join(format!("planish-sample-{}", &hasher.finalize().to_hex()[..12]))
}

/// Is a path the sample's?
pub fn is_sample(path: &Path) -> bool {
    path.file_name() == directory().file_name()
}

/// Stories as one text.
pub fn text(seed: u64) -> String {
    let texts: Vec<String> = (0..STORIES).map(|n| sample::story(SEED ^ seed, n).text).collect();
    texts.join(&format!("\n{SEPARATOR}\n"))
}

/// Stories as the data of a job, with their entropy.
///
/// # Errors
/// If the tokenizer fails.
pub fn data(gpt: &Gpt, seed: u64) -> Result<Data> {
    let text = text(seed);
    let cutting = Cutting { separator: SEPARATOR.into(), context: gpt.model.spec.context, blocks: false };
    let documents = data::documents(&text, &gpt.tokenizer, &cutting)?;
    let gate: Vec<(f64, usize)> = documents
        .iter()
        .enumerate()
        .filter(|(_, d)| d.percentile >= 80)
        .map(|(n, d)| (sample::story(SEED ^ seed, n as u64).nll, d.predicted()))
        .collect();
    let (nats, tokens) = gate.iter().fold((0.0, 0), |a, g| (a.0 + g.0, a.1 + g.1));
    Ok(Data {
        own: false,
        split: Split::new(documents),
        about: "stories of the built-in grammar".into(),
        hash: blake3::hash(text.as_bytes()).to_hex().to_string(),
        entropy: Some(nats / tokens.max(1) as f64),
    })
}
