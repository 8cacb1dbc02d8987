//! Learning rates over the steps.

use serde::{Deserialize, Serialize};

/// How the rate falls after it has risen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Curve {
    /// Along a cosine (arXiv 1608.03983).
    Cosine,
    /// Along a straight line.
    Linear,
    /// Not at all until the last part of the steps, then along a straight line: warm-up, stable, decay
    /// (arXiv 2404.06395).
    Wsd,
    /// Not at all.
    Constant,
}

impl Curve {
    /// All, with their names.
    pub const ALL: [(&str, Curve); 4] =
        [("cosine", Curve::Cosine), ("linear", Curve::Linear), ("wsd", Curve::Wsd), ("constant", Curve::Constant)];
}

/// The learning rate of every step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// The highest rate.
    pub rate: f64,
    /// Steps in which it rises to it.
    pub warm_up: u64,
    /// All steps.
    pub steps: u64,
    /// How it falls.
    pub curve: Curve,
    /// What it falls to, as a part of the highest.
    pub least: f64,
    /// Part of the steps over which [`Curve::Wsd`] falls.
    pub decay_part: f64,
}

impl Schedule {
    /// The rate of a step, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warm_up {
            return self.rate * (step + 1) as f64 / self.warm_up as f64;
        }
        let rest = (self.steps.saturating_sub(self.warm_up)).max(1) as f64;
        let part = ((step - self.warm_up) as f64 / rest).min(1.0);
        let decay = self.decay_part * self.steps as f64 / rest;
        let height = match self.curve {
            Curve::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * part).cos()),
            Curve::Linear => 1.0 - part,
            Curve::Wsd => ((1.0 - part) / decay).min(1.0),
            Curve::Constant => 1.0,
        };
        self.rate * (self.least + (1.0 - self.least) * height)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_rise_and_fall_as_their_names_say() {
        let schedule =
            |curve| Schedule { rate: 1.0, warm_up: 10, steps: 110, curve, least: 0.1, decay_part: 20.0 / 110.0 };
        for (name, curve) in Curve::ALL {
            let s = schedule(curve);
            assert!((s.at(4) - 0.5).abs() < 1e-12 && (s.at(9) - 1.0).abs() < 1e-12 && (s.at(10) - 1.0).abs() < 1e-12);
            let end = s.at(110);
            let want = if curve == Curve::Constant { 1.0 } else { 0.1 };
            assert!((end - want).abs() < 1e-12, "{name}: {end}");
        }
        assert!((schedule(Curve::Cosine).at(60) - 0.55).abs() < 1e-12);
        assert!((schedule(Curve::Linear).at(60) - 0.55).abs() < 1e-12);
        assert!(
            (schedule(Curve::Wsd).at(90) - 1.0).abs() < 1e-12 && (schedule(Curve::Wsd).at(100) - 0.55).abs() < 1e-12
        );
    }
}
