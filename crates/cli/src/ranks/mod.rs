//! This process as one of several that `mpirun` or Slurm started: who it is, who speaks, and how all of them end.

#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "mpi")]
mod watch;

use crate::{args::Command, exit, show};
use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use train::ranks::{self, Ranks};

/// Who this process is, as what started it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Launch {
    rank: usize,
    size: usize,
}

/// Where launchers say so: Open MPI, MPICH and Slurm's PMI, Slurm with PMIx.
const LAUNCHERS: [[&str; 2]; 3] =
    [["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"], ["PMI_RANK", "PMI_SIZE"], ["PMIX_RANK", "SLURM_STEP_NUM_TASKS"]];

/// None for a process that was started alone.
fn launch(variable: impl Fn(&str) -> Option<String>) -> Option<Launch> {
    let number = |name: &str| variable(name)?.trim().parse::<usize>().ok();
    let found = LAUNCHERS.iter().find_map(|[rank, size]| Some(Launch { rank: number(rank)?, size: number(size)? }));
    found.filter(|launch| launch.size > 1)
}

fn launched() -> Option<Launch> {
    launch(|name| std::env::var(name).ok())
}

/// Does this process speak for the others?
pub fn speaks() -> bool {
    launched().is_none_or(|launch| launch.rank == 0)
}

/// Joins the other ranks, where there are any; returns how many workers are this rank's.
///
/// # Errors
/// If the command is done by one process, or this program cannot speak with others.
pub fn start(command: &Command) -> Result<Option<usize>> {
    let Some(launch) = launched() else { return Ok(None) };
    let shared = matches!(
        command,
        Command::Train(_) | Command::Finetune(_) | Command::Distill(_) | Command::Evaluate(_) | Command::Calibrate(_)
    );
    if !shared {
        bail!(
            "{} processes were started, and only train, finetune, distill, evaluate and calibrate share out their work; start this \
             command without mpirun or srun",
            launch.size
        );
    }
    join(launch)
}

#[cfg(feature = "mpi")]
fn join(launch: Launch) -> Result<Option<usize>> {
    mpi::join(launch.size).map(Some)
}

#[cfg(not(feature = "mpi"))]
fn join(launch: Launch) -> Result<Option<usize>> {
    bail!(
        "was started as one of {} ranks, and this planish was built without MPI: build it with `cargo build --release \
         --features mpi` (Debian: libopenmpi-dev, libclang-dev), or start one process",
        launch.size
    )
}

/// The last word of a rank that failed.
#[derive(Serialize, Deserialize)]
struct LastWord {
    code: u8,
    said: String,
}

/// Ends the process, and with it all ranks: what went wrong on any of them is said once. Returns the exit code.
pub fn end(result: Result<u8>, json: bool) -> u8 {
    let ranks = ranks::of_process();
    if ranks.size() == 1 {
        return result.unwrap_or_else(|e| {
            let code = exit::code(&e);
            show::error(&e, code, json);
            code
        });
    }
    let code = agree(&*ranks, result, json);
    #[cfg(feature = "mpi")]
    mpi::leave();
    // Launchers show the code of any rank that fails.
    if ranks.rank() == 0 { code } else { 0 }
}

fn agree(ranks: &dyn Ranks, result: Result<u8>, json: bool) -> u8 {
    let own = match &result {
        Ok(code) => match ranks::meet(ranks, &[]) {
            Ok(_) => return *code,
            Err(_) => None,
        },
        Err(e) if elsewhere(e) => None,
        Err(e) => {
            let word = LastWord { code: exit::code(e), said: show::words(e) };
            match ranks::fail(ranks) {
                Ok(()) => Some(word),
                Err(_) => return alone(&word),
            }
        }
    };
    let bytes = own.as_ref().and_then(|word| serde_json::to_vec(word).ok()).unwrap_or_default();
    let words = ranks.gather(bytes).unwrap_or_default();
    let words =
        words.iter().enumerate().filter_map(|(rank, w)| Some((rank, serde_json::from_slice::<LastWord>(w).ok()?)));
    let words: Vec<(usize, LastWord)> = words.collect();
    let Some((rank, word)) = words.first() else {
        return alone(&own.unwrap_or(LastWord { code: exit::FAULT, said: ranks::gone().to_string() }));
    };
    let whose = if words.len() == ranks.size() { String::new() } else { format!("rank {rank}: ") };
    show::error(&anyhow::anyhow!("{whose}{}", word.said), word.code, json);
    word.code
}

/// The others cannot be reached.
fn alone(word: &LastWord) -> u8 {
    show::last_word(&word.said);
    word.code
}

/// Did another rank fail, not this one?
fn elsewhere(e: &anyhow::Error) -> bool {
    e.chain().any(|cause| {
        matches!(cause.downcast_ref(), Some(train::Error::Elsewhere))
            || matches!(cause.downcast_ref(), Some(optimize::Error::Train(train::Error::Elsewhere)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launchers_say_who_a_process_is() {
        let of = |pairs: &[(&str, &str)]| {
            launch(|name| pairs.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string()))
        };
        assert_eq!(of(&[]), None);
        assert_eq!(
            of(&[("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")]),
            Some(Launch { rank: 1, size: 2 })
        );
        assert_eq!(of(&[("PMI_RANK", "0"), ("PMI_SIZE", "4")]), Some(Launch { rank: 0, size: 4 }));
        assert_eq!(of(&[("PMIX_RANK", "3"), ("SLURM_STEP_NUM_TASKS", "4")]), Some(Launch { rank: 3, size: 4 }));
        // One process is started by mpirun as well, and a Slurm script is no rank.
        assert_eq!(of(&[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "1")]), None);
        assert_eq!(of(&[("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "4")]), None);
    }
}
