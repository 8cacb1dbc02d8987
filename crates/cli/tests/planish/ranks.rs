//! Several processes at one job, started by `mpirun`. With the feature `mpi` only.

use crate::{json, path, planish, sample};
use std::{
    fs,
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

/// `mpirun`, which may start more ranks than there are cores, and as root; none where it is not installed.
fn mpirun() -> Option<Command> {
    if Command::new("mpirun").arg("--version").output().is_err() {
        println!("skipped: needs mpirun (Debian: openmpi-bin)");
        return None;
    }
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "--bind-to", "none"]);
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    Some(command)
}

/// A command of planish on so many ranks of one thread each.
fn on(ranks: usize, words: &[&str]) -> Option<Command> {
    let mut command = mpirun()?;
    command.args(["-n", &ranks.to_string(), env!("CARGO_BIN_EXE_planish")]).args(words).args(["--threads", "1"]);
    Some(command)
}

fn good(command: &mut Command) -> Output {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    out
}

/// It has to fail with this code, and what planish says of it comes once.
fn bad(command: &mut Command, code: i32, says: &str) {
    let out = command.output().unwrap();
    let errors = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{command:?}: {errors}");
    let said: Vec<&str> = errors.lines().filter(|line| line.starts_with("planish: ")).collect();
    assert!(matches!(said[..], [line] if line.contains(says)), "{command:?} should say {says:?} once: {errors}");
}

/// The manifest has the hash of every other file.
fn same(a: &str, b: &str) {
    let weights =
        |d: &str| ["model.safetensors", "adapter_model.safetensors"].map(|name| fs::read(Path::new(d).join(name)).ok());
    assert!(weights(a) == weights(b) && weights(a).iter().any(Option::is_some), "weights of {a} and {b} differ");
    for name in ["training.json", "manifest.json"] {
        let read = |d: &str| fs::read(Path::new(d).join(name)).unwrap();
        assert!(read(a) == read(b), "{name} of {a} and {b} differ");
    }
}

/// A command with six parts a step, one sequence each.
fn lesson<'a>(command: &[&'a str], data: &'a str, more: &[&'a str], out: &'a str) -> Vec<&'a str> {
    let six = ["--batch", "6", "--part", "1", "--context", "48", "--lr", "3e-4", "--data", data, "--out", out];
    [command, &six, more].concat()
}

#[test]
fn any_number_of_ranks_ends_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    for (command, counts) in [
        (&["finetune", &folder][..], &[1, 2, 4][..]),
        (&["distill", "--teacher", &folder, "--student-layers", "0,2"], &[3]),
        (&["finetune", &folder, "--lora", "rank=2"], &[2]),
    ] {
        let more = ["--steps", "10", "--validate-every", "5"];
        let alone = path(&dir, &format!("{}-{}-alone", command[0], command.len()));
        json(&lesson(command, &text, &more, &alone));
        for ranks in counts {
            let out = path(&dir, &format!("{}-{}-{ranks}", command[0], command.len()));
            let Some(mut run) = on(*ranks, &lesson(command, &text, &more, &out)) else { return };
            let said = good(run.arg("--json"));
            let lines = String::from_utf8_lossy(&said.stdout).lines().count();
            assert_eq!(lines, 1, "one rank speaks: {}", String::from_utf8_lossy(&said.stdout));
            same(&alone, &out);
        }
    }
    // A model from nothing: one rank makes it.
    let config = "[model]\narchitectures = ['LlamaForCausalLM']\nhidden_size = 32\nintermediate_size = 64\n\
                  num_hidden_layers = 2\nnum_attention_heads = 2\nmax_position_embeddings = 64\n[tokenizer]\nvocab = 300\n\
                  [data]\ntrain = 'stories.txt'\n[training]\nsteps = 6\nbatch = 5\npart = 1\n";
    fs::write(path(&dir, "new.toml"), config).unwrap();
    let (config, alone, shared) = (path(&dir, "new.toml"), path(&dir, "new-alone"), path(&dir, "new-2"));
    json(&["train", &config, "--out", &alone]);
    let Some(mut run) = on(2, &["train", &config, "--out", &shared]) else { return };
    good(&mut run);
    same(&alone, &shared);
    assert!(!dir.path().join("new-2.start").exists());
    // Where ranks have nothing to do, that is said, and changes nothing.
    let few = path(&dir, "few");
    let words =
        ["finetune", &folder, "--data", &text, "--steps", "2", "--batch", "2", "--context", "48", "--out", &few];
    let Some(mut run) = on(2, &words) else { return };
    let errors = good(&mut run).stderr;
    assert!(String::from_utf8_lossy(&errors).contains("1 of 2 ranks have nothing to learn"));
}

/// The process of a rank that `mpirun` started.
fn process(parent: u32, rank: usize) -> Option<u32> {
    let wanted = format!("OMPI_COMM_WORLD_RANK={rank}");
    fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let id: u32 = entry.file_name().to_str()?.parse().ok()?;
        let status = fs::read_to_string(entry.path().join("status")).ok()?;
        let own = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse::<u32>().ok()?;
        let environment = fs::read(entry.path().join("environ")).ok()?;
        let is_rank = environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes());
        (own == parent && is_rank).then_some(id)
    })
}

fn wait(child: Child, limit: Duration) -> (Output, Duration) {
    let begin = Instant::now();
    let out = child.wait_with_output().unwrap();
    let time = begin.elapsed();
    assert!(time < limit, "ranks hang for {time:?}: {}", String::from_utf8_lossy(&out.stderr));
    (out, time)
}

#[test]
fn a_killed_rank_ends_the_job_which_goes_on_with_another_number_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let (alone, killed) = (path(&dir, "alone"), path(&dir, "killed"));
    let more = ["--steps", "200", "--checkpoint-every", "3", "--validate-every", "50"];
    let command = ["finetune", &folder];
    for (ranks, victim) in [(2, 1), (4, 0), (3, 2)] {
        let Some(mut run) = on(ranks, &lesson(&command, &text, &more, &killed)) else { return };
        let child = run.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let checkpoint = Path::new(&format!("{killed}.partial")).join("checkpoint.safetensors");
        let before = fs::metadata(&checkpoint).and_then(|m| m.modified()).ok();
        let begin = Instant::now();
        while fs::metadata(&checkpoint).and_then(|m| m.modified()).ok() == before {
            assert!(begin.elapsed() < Duration::from_secs(60), "no checkpoint");
            thread::sleep(Duration::from_millis(2));
        }
        let id = process(child.id(), victim).unwrap();
        assert!(Command::new("kill").args(["-9", &id.to_string()]).status().unwrap().success());
        let (out, time) = wait(child, Duration::from_secs(10));
        let errors = String::from_utf8_lossy(&out.stderr);
        println!("rank {victim} of {ranks} killed: ended after {time:?}");
        assert!(!out.status.success() && !Path::new(&killed).exists(), "{errors}");
        assert!(errors.contains(&format!("planish: rank {victim} (process {id} on ")), "{errors}");
        assert!(errors.contains("it goes on from step "), "{errors}");
    }
    json(&lesson(&command, &text, &more, &alone));
    json(&lesson(&command, &text, &more, &killed));
    same(&alone, &killed);
}

#[test]
fn evaluation_is_shared_out_and_says_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let small = path(&dir, "small");
    json(&["quantize", &folder, "--bits", "4", "--data", &text, "--out", &small]);
    for words in
        [&["evaluate", &small, "--data", &text][..], &["evaluate", &small, "--against", &folder, "--data", &text]]
    {
        let alone = good(planish().args(words).arg("--json")).stdout;
        for ranks in [2, 3] {
            let Some(mut run) = on(ranks, words) else { return };
            let shared = good(run.arg("--json")).stdout;
            assert_eq!(String::from_utf8_lossy(&shared), String::from_utf8_lossy(&alone), "{words:?} on {ranks}");
        }
    }
}

#[test]
fn calibration_is_shared_out_and_sums_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    for ending in ["safetensors", "gguf"] {
        let out = |name: &str| path(&dir, &format!("{name}.{ending}"));
        let words = |out| vec!["calibrate".into(), folder.clone(), "--data".into(), text.clone(), "--out".into(), out];
        let alone = good(planish().args(words(out("alone"))).arg("--json")).stdout;
        for ranks in [2, 3] {
            let shared = out(&ranks.to_string());
            let words = words(shared.clone());
            let Some(mut run) = on(ranks, &words.iter().map(String::as_str).collect::<Vec<_>>()) else { return };
            let said = good(run.arg("--json")).stdout;
            assert!(fs::read(&shared).unwrap() == fs::read(out("alone")).unwrap(), "{ending} on {ranks} ranks");
            let told = String::from_utf8_lossy(&said).replace(&shared, &out("alone"));
            assert_eq!(told, String::from_utf8_lossy(&alone));
        }
    }
}

#[test]
fn what_fails_on_any_rank_is_said_once() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let out = path(&dir, "out");
    let empty = path(&dir, "empty.txt");
    fs::write(&empty, " \n").unwrap();
    let other = path(&dir, "other.txt");
    fs::write(&other, fs::read_to_string(&text).unwrap().replace("the", "a")).unwrap();
    let command = ["finetune", &folder];
    let Some(mut run) = on(2, &lesson(&command, &empty, &["--steps", "5"], &out)) else { return };
    bad(&mut run, 2, "is empty");
    // On one rank only, by another data file there.
    let differ = |first: &str, second: &str, says: &str| {
        let mut run = mpirun().unwrap();
        for (i, data) in [first, second].into_iter().enumerate() {
            run.args(&[":"][..i]).args(["-n", "1", env!("CARGO_BIN_EXE_planish")]).args(lesson(
                &command,
                data,
                &["--steps", "5"],
                &out,
            ));
            run.args(["--threads", "1"]);
        }
        bad(&mut run, 2, says);
    };
    differ(&text, &empty, "rank 1: ");
    differ(&empty, &text, "rank 0: ");
    differ(&text, &other, "rank 1 (");
    // In the midst of learning, the values of all ranks grow beyond bounds.
    let more = ["--steps", "5", "--warm-up", "0", "--clip", "0", "--weight-decay", "1e38"];
    let Some(mut run) = on(2, &lesson(&command, &text, &more, &out)) else { return };
    bad(&mut run, 2, "is not finite");
    assert!(!Path::new(&out).exists());
    let Some(mut run) = on(2, &["inspect", &folder]) else { return };
    bad(&mut run, 2, "only train, finetune, distill, evaluate and calibrate share out their work");
}
