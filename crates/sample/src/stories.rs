//! The story grammar: short tales whose true probability is known.
//!
//! Every choice speaks at once: what is chosen is the next piece of text, and no alternative of a choice begins
//! with another. A text therefore has at most one derivation, and its probability is the product of its choices;
//! [`score`] finds that product from the text alone. Names, animals, things, places and traits come back later
//! in the story, colours, foods, sounds and sums follow fixed facts, so a model has to look back and to remember.

use crate::{random::Draws, words::*};

/// A story and what it costs to tell.
#[derive(Clone, Debug, PartialEq)]
pub struct Story {
    /// The text.
    pub text: String,
    /// `-ln` of its probability, in nats: no model can do better on average.
    pub nll: f64,
}

/// Story `number` of a seed.
pub fn story(seed: u64, number: u64) -> Story {
    let mut speaker = Speaker { draws: Draws::new(seed, number), text: String::new(), nll: 0.0 };
    // A speaker never fails to choose.
    let _ = tell(&mut speaker);
    Story { text: speaker.text, nll: speaker.nll }
}

/// `-ln` of the probability of a text, or `None` where no story reads so.
pub fn score(text: &str) -> Option<f64> {
    let mut listener = Listener { rest: text, nll: 0.0 };
    tell(&mut listener)?;
    listener.rest.is_empty().then_some(listener.nll)
}

/// Tells a story or follows one.
trait Teller {
    /// Says one of several pieces of text, with weights; returns which.
    fn pick(&mut self, pieces: &[(&str, f64)]) -> Option<usize>;

    /// Says a piece of text that is certain.
    fn say(&mut self, text: &str) -> Option<()> {
        self.pick(&[(text, 1.0)]).map(|_| ())
    }
}

struct Speaker {
    draws: Draws,
    text: String,
    nll: f64,
}

impl Teller for Speaker {
    fn pick(&mut self, pieces: &[(&str, f64)]) -> Option<usize> {
        let total: f64 = pieces.iter().map(|p| p.1).sum();
        let mut left = if pieces.len() > 1 { self.draws.next() * total } else { 0.0 };
        let mut chosen = pieces.len() - 1;
        for (i, (_, weight)) in pieces.iter().enumerate() {
            left -= weight;
            if left < 0.0 {
                chosen = i;
                break;
            }
        }
        self.text += pieces[chosen].0;
        self.nll -= (pieces[chosen].1 / total).ln();
        Some(chosen)
    }
}

struct Listener<'a> {
    rest: &'a str,
    nll: f64,
}

impl Teller for Listener<'_> {
    fn pick(&mut self, pieces: &[(&str, f64)]) -> Option<usize> {
        let mut matching = pieces.iter().enumerate().filter(|(_, p)| self.rest.starts_with(p.0));
        let (chosen, piece) = matching.next()?;
        if matching.next().is_some() {
            return None;
        }
        let total: f64 = pieces.iter().map(|p| p.1).sum();
        self.rest = &self.rest[piece.0.len()..];
        self.nll -= (piece.1 / total).ln();
        Some(chosen)
    }
}

/// Earlier entries of a table are likelier, as words of a language are.
fn falling(rank: usize) -> f64 {
    1.0 / (rank as f64 + 3.0)
}

/// Says a word of a table, followed by `end`; likelier ones come first.
fn word(t: &mut dyn Teller, words: &[&str], end: &str, skip: Option<usize>) -> Option<usize> {
    let numbers: Vec<usize> = (0..words.len()).filter(|i| Some(*i) != skip).collect();
    let pieces: Vec<(String, f64)> = numbers.iter().map(|i| (format!("{}{end}", words[*i]), falling(*i))).collect();
    let pieces: Vec<(&str, f64)> = pieces.iter().map(|(s, w)| (s.as_str(), *w)).collect();
    t.pick(&pieces).map(|i| numbers[i])
}

fn firsts<T: Copy, R: Copy>(table: &[T], first: impl Fn(T) -> R) -> Vec<R> {
    table.iter().map(|row| first(*row)).collect()
}

/// Who and what a story is about.
struct Cast {
    hero: usize,
    friend: usize,
    animal: usize,
    thing: usize,
    place: usize,
    virtue: usize,
}

impl Cast {
    fn hero(&self) -> &'static str {
        NAMES[self.hero].0
    }

    fn friend(&self) -> &'static str {
        NAMES[self.friend].0
    }

    fn animal(&self) -> &'static str {
        ANIMALS[self.animal].0
    }

    fn thing(&self) -> &'static str {
        THINGS[self.thing].0
    }

    /// The hero's pronoun as subject, possessive and object.
    fn pronouns(&self) -> (&'static str, &'static str, &'static str) {
        if NAMES[self.hero].1 { ("She", "her", "her") } else { ("He", "his", "him") }
    }
}

/// A whole story; `None` where a listener hears something that no story says.
fn tell(t: &mut dyn Teller) -> Option<()> {
    let cast = opening(t)?;
    weather(t, &cast)?;
    let found = finding(t, &cast)?;
    let middles = t.pick(&[(" Then", 0.5), (" After a while", 0.3), (" Suddenly", 0.2)])?;
    meeting(t, &cast, middles)?;
    if t.pick(&[(" On the way home", 0.6), (" Before long", 0.4)])? == 0 {
        counting(t, &cast)?;
    } else {
        feeding(t, &cast)?;
    }
    ending(t, &cast, found)
}

fn opening(t: &mut dyn Teller) -> Option<Cast> {
    let names = firsts(NAMES, |n| n.0);
    let traits = firsts(TRAITS, |n| n.0);
    let (hero, virtue) = if t.pick(&[("Once there was a ", 0.6), ("In a small town lived a ", 0.4)])? == 0 {
        let virtue = word(t, &traits, " child named ", None)?;
        (word(t, &names, ".", None)?, virtue)
    } else {
        let virtue = word(t, &traits, " child. Everyone called the child ", None)?;
        (word(t, &names, ".", None)?, virtue)
    };
    t.say(" ")?;
    t.say(NAMES[hero].0)?;
    t.say(" had a ")?;
    let animal = word(t, &firsts(ANIMALS, |a| a.0), "", None)?;
    if t.pick(&[(" that ate ", 0.5), (" and a friend named ", 0.5)])? == 0 {
        t.say(ANIMALS[animal].1)?;
        t.say(" and a friend named ")?;
    }
    let friend = word(t, &names, ".", Some(hero))?;
    t.say(" One ")?;
    word(t, TIMES, " ", None)?;
    t.say(NAMES[hero].0)?;
    t.pick(&[(" went to ", 0.5), (" walked to ", 0.3), (" ran to ", 0.2)])?;
    let place = word(t, &firsts(PLACES, |p| p.0), "", None)?;
    t.pick(&[(" with the ", 0.7), (" to look for the ", 0.3)])?;
    t.say(ANIMALS[animal].0)?;
    t.say(".")?;
    Some(Cast { hero, friend, animal, thing: 0, place, virtue })
}

fn weather(t: &mut dyn Teller, cast: &Cast) -> Option<()> {
    t.say(" ")?;
    let weather = word(t, &firsts(WEATHER, |w| w.0), "", None)?;
    t.say(" and ")?;
    let who = t.pick(&[("the child", 0.3), (cast.hero(), 0.4), ("everybody", 0.3)])?;
    t.say(if who == 2 { " was " } else { " soon was " })?;
    t.say(WEATHER[weather].1)?;
    t.say(".")
}

/// The thing of the story, found or lost.
fn finding(t: &mut dyn Teller, cast: &Cast) -> Option<usize> {
    let (subject, possessive, _) = cast.pronouns();
    t.say(" ")?;
    t.say(subject)?;
    let lost = t.pick(&[(" found a ", 0.55), (" had lost a ", 0.45)])?;
    let colour = word(t, COLOURS, " ", None)?;
    let things: Vec<usize> = (0..THINGS.len()).filter(|i| THINGS[*i].1 == COLOURS[colour]).collect();
    let names: Vec<&str> = things.iter().map(|i| THINGS[*i].0).collect();
    let thing = things[word(t, &names, "", None)?];
    let where_ = if lost == 0 { " under " } else { " behind " };
    t.say(where_)?;
    t.pick(&[("a tree", 0.4), ("a stone", 0.3), ("the stairs", 0.2), ("an old wall", 0.1)])?;
    t.say(" and showed it to ")?;
    let to = t.pick(&[(possessive, 0.5), ("the ", 0.5)])?;
    if to == 0 {
        t.say(" ")?;
        t.say(cast.animal())?;
    } else {
        t.say(PLACES[cast.place].1)?;
    }
    t.say(".")?;
    Some(thing)
}

fn meeting(t: &mut dyn Teller, cast: &Cast, middle: usize) -> Option<()> {
    t.say(if middle == 2 { " the " } else { " came the " })?;
    t.say(PLACES[cast.place].1)?;
    t.say(if middle == 2 { " stood there. " } else { ". " })?;
    match t.pick(&[("\"", 0.6), ("The ", 0.4)])? {
        0 => {
            let words = t.pick(&[("What have you got, ", 0.5), ("Be careful, ", 0.3), ("Good day, ", 0.2)])?;
            t.say(cast.hero())?;
            t.say(["?\" asked the ", "!\" cried the ", ".\" said the "][words])?;
            t.say(PLACES[cast.place].1)?;
        }
        _ => {
            t.say(cast.animal())?;
            t.say(" ")?;
            t.say(ANIMALS[cast.animal].2)?;
            t.pick(&[(" at once", 0.5), (" and ran away", 0.3), (" and came closer", 0.2)])?;
        }
    }
    t.say(".")
}

fn counting(t: &mut dyn Teller, cast: &Cast) -> Option<()> {
    let (subject, _, _) = cast.pronouns();
    t.say(" ")?;
    t.say(cast.friend())?;
    t.say(" gave ")?;
    t.say(cast.hero())?;
    t.say(" ")?;
    let a = word(t, &NUMBERS[2..7], " ", None)? + 2;
    let what = word(t, COUNTED, " and then ", None)?;
    let b = word(t, &NUMBERS[2..7], " more. ", None)? + 2;
    t.say(subject)?;
    t.say(" counted ")?;
    t.say(NUMBERS[a + b])?;
    t.say(" ")?;
    t.say(COUNTED[what])?;
    t.say(".")
}

fn feeding(t: &mut dyn Teller, cast: &Cast) -> Option<()> {
    t.say(" the ")?;
    t.say(cast.animal())?;
    t.say(" was hungry, so ")?;
    t.say(cast.friend())?;
    t.pick(&[(" brought ", 0.5), (" bought ", 0.3), (" looked for ", 0.2)])?;
    t.say(ANIMALS[cast.animal].1)?;
    t.say(" and the ")?;
    t.say(cast.animal())?;
    t.say(" ")?;
    t.say(ANIMALS[cast.animal].2)?;
    t.say(".")
}

fn ending(t: &mut dyn Teller, cast: &Cast, thing: usize) -> Option<()> {
    let cast = Cast { thing, ..*cast };
    let (_, _, object) = cast.pronouns();
    t.say(" At last ")?;
    if t.pick(&[(cast.friend(), 0.5), ("the ", 0.5)])? == 1 {
        t.say(PLACES[cast.place].1)?;
    }
    t.pick(&[(" took the ", 0.4), (" gave back the ", 0.3), (" kept the ", 0.3)])?;
    t.say(THINGS[cast.thing].1)?;
    t.say(" ")?;
    t.say(cast.thing())?;
    t.say(" and ")?;
    t.say(cast.hero())?;
    t.say(" was ")?;
    word(t, FEELINGS, ".", None)?;
    t.say(" So ")?;
    t.say(TRAITS[cast.virtue].1)?;
    t.say(" helped ")?;
    t.say(object)?;
    t.say(" in the end.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn a_text_tells_its_own_probability() {
        for number in 0..20_000 {
            let s = story(7, number);
            let heard = score(&s.text).unwrap_or_else(|| panic!("{}", s.text));
            assert!((heard - s.nll).abs() < 1e-9, "{}", s.text);
        }
        assert_eq!(score("Once there was a dragon."), None);
        assert_eq!(score(&(story(7, 0).text + " ")), None);
    }

    #[test]
    fn stories_follow_seed_and_number_and_hardly_ever_repeat() {
        assert_eq!(story(1, 5), story(1, 5));
        let mut seen = BTreeMap::new();
        for number in 0..20_000 {
            *seen.entry(story(1, number).text).or_insert(0) += 1;
        }
        assert!(seen.len() > 19_990, "{}", seen.len());
        assert_ne!(story(1, 5), story(2, 5));
    }

    #[test]
    fn the_mean_cost_is_the_entropy_whatever_the_seed() {
        let mean = |seed| (0..20_000).map(|n| story(seed, n).nll).sum::<f64>() / 20_000.0;
        let (a, b) = (mean(11), mean(12));
        println!("entropy: {a:.3} and {b:.3} nats a story");
        assert!((a - b).abs() < 0.1, "{a} {b}");
    }
}
