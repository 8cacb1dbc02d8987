//! Guessing ahead and reusing what was read change no token: on every family's golden model and on the real ones.
#![allow(clippy::unwrap_used, clippy::panic)]

use formats::tokenizer::Tokenizer;
use model::{
    Gpt, Sampling,
    generate::{Ended, Generator, Limits, Output, generate},
    load,
    speculate::Speculator,
};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

fn golden() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let mut dirs: Vec<PathBuf> =
        std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    dirs.sort();
    assert!(dirs.len() >= 30);
    dirs
}

/// As many words as the model has tokens: `w0 w1 ...`.
fn words(vocab: usize) -> Tokenizer {
    let vocab: Map<String, Value> = (0..vocab).map(|id| (format!("w{id}"), json!(id))).collect();
    let file = json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": null, "decoder": null, "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
    });
    Tokenizer::from_json(file, Path::new("words.json")).unwrap()
}

/// A golden model, which has no tokenizer of its own.
fn made(dir: &Path, packed: bool) -> Gpt {
    let mut model = load::open(dir).unwrap().model;
    if packed {
        model.pack().unwrap();
    }
    Gpt {
        path: dir.into(),
        tokenizer: words(model.spec.vocab),
        model,
        ends: Vec::new(),
        template: None,
        generation: None,
        files: Vec::new(),
        unused: Vec::new(),
        format: None,
        decoded: Vec::new(),
        kept: None,
    }
}

fn data() -> Option<PathBuf> {
    let beside = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
    let root = std::env::var_os("PLANISH_DATA").map_or(beside, PathBuf::from);
    if !root.is_dir() {
        told("skipped: needs ../shared/data");
        return None;
    }
    Some(root)
}

fn real(root: &Path, name: &str, packed: bool) -> Gpt {
    let mut gpt = Gpt::open(&root.join("models").join(name)).unwrap();
    if packed {
        gpt.model.pack().unwrap();
    }
    gpt
}

/// Says so past the test harness, which keeps what a passing test prints to itself.
fn told(words: &str) {
    use std::io::Write;
    // A closed standard error is no reason to fail a test.
    let _ = writeln!(std::io::stderr(), "{words}");
}

fn greedy() -> Sampling {
    Sampling::default()
}

fn drawn() -> Sampling {
    Sampling { temperature: 0.8, seed: 7, ..Sampling::default() }
}

fn tokens(tokens: usize) -> Limits {
    Limits { tokens, ignore_end: true, ..Limits::default() }
}

/// What a generator writes; the pieces that it shows are its text.
fn write(generator: &mut Generator<'_>, prompt: &[u32], sampling: &Sampling, limits: &Limits) -> Output {
    let mut heard = String::new();
    let out = generator.generate(prompt, sampling, limits, &mut |piece| {
        heard += piece;
        true
    });
    let out = out.unwrap();
    assert_eq!(heard, out.text);
    out
}

fn plain(gpt: &Gpt, prompt: &[u32], sampling: &Sampling, limits: &Limits) -> Output {
    generate(gpt, prompt, sampling, limits, &mut |_| true).unwrap()
}

fn assert_same(got: &Output, want: &Output, what: &str) {
    assert_eq!((&got.ids, &got.text, got.ended), (&want.ids, &want.text, want.ended), "{what}");
}

/// A prompt that says the same three times, short enough for every golden model.
const PROMPT: [u32; 9] = [11, 29, 5, 11, 29, 5, 11, 29, 5];

#[test]
fn every_family_writes_the_same_with_guesses() {
    let (mut proposed, mut accepted) = ([0; 2], [0; 2]);
    for dir in golden() {
        for packed in [false, true] {
            let (gpt, other) = (made(&dir, packed), made(&dir, !packed));
            for sampling in [greedy(), drawn(), Sampling { repetition_penalty: 1.3, ..drawn() }] {
                let what = format!("{} packed {packed} {sampling:?}", dir.display());
                let want = plain(&gpt, &PROMPT, &sampling, &tokens(60));
                let speculators = [Speculator::lookup(8), Speculator::draft(&other, &gpt, 8).unwrap()];
                for (i, speculator) in speculators.into_iter().enumerate() {
                    let mut generator = Generator::new(&gpt).with(speculator);
                    let out = write(&mut generator, &PROMPT, &sampling, &tokens(60));
                    assert_same(&out, &want, &what);
                    let work = &out.work;
                    assert!(work.accepted <= work.proposed && work.steps + work.accepted + 1 >= out.ids.len());
                    proposed[i] += work.proposed;
                    accepted[i] += work.accepted;
                }
            }
        }
    }
    // Some guesses were right and some were wrong, or the test would say nothing.
    for i in 0..2 {
        assert!(accepted[i] > 100 && proposed[i] > accepted[i] + 100, "{accepted:?} of {proposed:?}");
    }
}

#[test]
fn every_family_goes_on_from_what_it_read_before() {
    for dir in golden() {
        let gpt = made(&dir, true);
        if gpt.model.spec.context < 64 {
            continue;
        }
        let what = dir.display().to_string();
        let mut generator = Generator::new(&gpt).with(Speculator::lookup(8));
        let first = write(&mut generator, &PROMPT, &greedy(), &tokens(12));
        assert_eq!(first.work.reused_tokens, 0);
        // It goes on where it was, and then turns off in the middle.
        let on = [&PROMPT[..], &first.ids, &[3, 11, 29]].concat();
        let off = [&on[..15], &[8, 8]].concat();
        for (prompt, least) in [(on, PROMPT.len() + 11), (off, 15)] {
            let out = write(&mut generator, &prompt, &drawn(), &tokens(20));
            assert!((least..prompt.len()).contains(&out.work.reused_tokens), "{what}: {:?}", out.work);
            assert_same(&out, &plain(&gpt, &prompt, &drawn(), &tokens(20)), &what);
        }
    }
}

#[test]
fn a_draft_that_is_the_model_is_always_right() {
    let dirs = golden();
    let windowed = dirs.iter().find(|d| d.ends_with("mistral-window")).unwrap();
    let (gpt, draft) = (made(windowed, true), made(windowed, true));
    for sampling in [greedy(), drawn()] {
        let mut generator = Generator::new(&gpt).with(Speculator::draft(&draft, &gpt, 8).unwrap());
        // The second time around nothing but the last token of the prompt is read.
        for reused in [0, PROMPT.len() - 1] {
            let out = write(&mut generator, &PROMPT, &sampling, &tokens(100));
            assert_eq!((out.work.accepted, out.work.reused_tokens), (out.work.proposed, reused));
            assert!(out.work.steps <= 14, "{:?}", out.work);
        }
    }
}

#[test]
fn an_output_ends_inside_right_guesses_where_it_would_end_without() {
    let dirs = golden();
    let dir = dirs.iter().find(|d| d.ends_with("qwen2-tied")).unwrap();
    let (mut gpt, draft) = (made(dir, false), made(dir, false));
    let long = plain(&gpt, &PROMPT, &greedy(), &tokens(1000));
    assert_eq!(long.ended, Ended::Context);
    let speak = |gpt: &Gpt, limits: &Limits| {
        let want = plain(gpt, &PROMPT, &greedy(), limits);
        for speculator in [Speculator::lookup(8), Speculator::draft(&draft, gpt, 8).unwrap()] {
            let out = write(&mut Generator::new(gpt).with(speculator), &PROMPT, &greedy(), limits);
            assert_same(&out, &want, &format!("{limits:?}"));
        }
        want.ended
    };
    assert_eq!(speak(&gpt, &tokens(1000)), Ended::Context);
    for n in 0..20 {
        assert_eq!(speak(&gpt, &tokens(n)), Ended::Tokens);
    }
    for n in 0..12 {
        let stops = vec![format!("w{} w{}", long.ids[n], long.ids[n + 1])];
        assert_eq!(speak(&gpt, &Limits { stops, ..tokens(40) }), Ended::Stop);
        gpt.ends = vec![long.ids[n]];
        assert_eq!(speak(&gpt, &Limits { ignore_end: false, ..tokens(40) }), Ended::End);
    }
}

#[test]
fn a_listener_that_has_enough_ends_a_run_of_guesses() {
    let dirs = golden();
    let gpt = made(dirs.iter().find(|d| d.ends_with("gpt2")).unwrap(), true);
    let mut generator = Generator::new(&gpt).with(Speculator::draft(&gpt, &gpt, 8).unwrap());
    let mut pieces = 0;
    let out = generator.generate(&PROMPT, &greedy(), &tokens(50), &mut |_| {
        pieces += 1;
        pieces < 7
    });
    let out = out.unwrap();
    assert_eq!((out.ids.len(), out.ended), (7, Ended::Listener));
    // What it read stays of use.
    let out = write(&mut generator, &PROMPT, &greedy(), &tokens(50));
    assert_same(&out, &plain(&gpt, &PROMPT, &greedy(), &tokens(50)), "after an interruption");
}

#[test]
fn a_draft_with_other_tokens_is_refused_and_both_are_named() {
    let dirs = golden();
    let [a, mut b] = ["gpt2", "gemma"].map(|n| made(dirs.iter().find(|d| d.ends_with(n)).unwrap(), false));
    let fault = |draft: &Gpt| Speculator::draft(draft, &a, 8).err().map(|e| e.to_string());
    b.tokenizer = words(a.tokenizer.vocab_size() + 1);
    let says = fault(&b).unwrap();
    assert!(says.contains("golden/gpt2") && says.contains("golden/gemma") && says.contains("same tokenizer"), "{says}");
    let mut swapped: Value = serde_json::from_str(a.tokenizer.json()).unwrap();
    let vocab = swapped["model"]["vocab"].as_object_mut().unwrap();
    vocab.insert("w8".into(), json!(9));
    vocab.insert("w9".into(), json!(8));
    b.tokenizer = Tokenizer::from_json(swapped, Path::new("swapped.json")).unwrap();
    let says = fault(&b).unwrap();
    assert!(says.contains("token 8 is \"w9\" in one and \"w8\" in the other"), "{says}");
}

#[test]
fn real_models_write_the_same_with_guesses() {
    let Some(root) = data() else { return };
    let text = "The cat saw the dog. The cat saw the hat. The cat saw";
    for name in ["stories260K-hf", "babyllama105-hf", "tinygpt-shakespeare-hf", "mix7m-hf"] {
        for packed in [false, true] {
            let (gpt, draft) = (real(&root, name, packed), real(&root, name, true));
            let prompt = gpt.tokenizer.encode(text, true).unwrap();
            for sampling in [greedy(), drawn()] {
                let want = plain(&gpt, &prompt, &sampling, &tokens(100));
                for speculator in [Speculator::lookup(8), Speculator::draft(&draft, &gpt, 5).unwrap()] {
                    let out = write(&mut Generator::new(&gpt).with(speculator), &prompt, &sampling, &tokens(100));
                    assert_same(&out, &want, &format!("{name} packed {packed} {sampling:?}"));
                }
            }
        }
    }
}

#[test]
fn a_repetitive_text_takes_few_steps() {
    let Some(root) = data() else { return };
    let gpt = real(&root, "mix7m-hf", true);
    let texts = std::fs::read_to_string(root.join("text/mix-eval/eval-wiki.txt")).unwrap();
    let line: String = texts.split("<|endoftext|>").nth(3).unwrap().trim().chars().take(90).collect();
    let prompt = gpt.tokenizer.encode(&format!("{line}\n").repeat(6), true).unwrap();
    let mut generator = Generator::new(&gpt).with(Speculator::lookup(8));
    let out = write(&mut generator, &prompt, &greedy(), &tokens(200));
    assert_same(&out, &plain(&gpt, &prompt, &greedy(), &tokens(200)), "a repetitive text");
    assert!(out.work.steps * 3 < out.ids.len(), "{:?}", out.work);
    assert!(out.work.accepted * 10 > out.work.proposed * 8, "{:?}", out.work);
}
