//! Rotary frequencies from a configuration, with the scalings that models are published with.

use crate::{
    Config, Result,
    spec::{Longer, RopeSpec, Stretch, inverse_frequencies},
};

/// Where a configuration keeps its rotary parameters.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The object with the kind of scaling.
    pub section: &'a str,
    /// The field with the base, where the section has none.
    pub theta: &'a str,
    /// The base where no field has one.
    pub default: f64,
}

/// Where most families keep them: `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta`.
pub fn usual(config: &Config) -> Place<'static> {
    let section = if config.get("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" };
    Place { section, theta: "rope_theta", default: 10_000.0 }
}

impl Place<'_> {
    /// The base of the frequencies.
    ///
    /// # Errors
    /// If it is not positive.
    pub fn theta(&self, config: &Config) -> Result<f64> {
        let theta = match config.number_or_none(&format!("{}.rope_theta", self.section))? {
            Some(theta) => theta,
            None => config.number_or(self.theta, self.default)?,
        };
        if theta > 0.0 { Ok(theta) } else { Err(config.error(self.theta, "must be positive")) }
    }

    /// The kind of scaling.
    ///
    /// # Errors
    /// If it is no text.
    pub fn kind<'c>(&self, config: &'c Config) -> Result<&'c str> {
        let old = config.text_or_none(&format!("{}.type", self.section))?;
        Ok(config.text_or_none(&format!("{}.rope_type", self.section))?.or(old).unwrap_or("default"))
    }

    /// How many of a head's channels turn.
    fn rotated(&self, config: &Config, head_dim: usize) -> Result<usize> {
        let field = format!("{}.partial_rotary_factor", self.section);
        let found =
            [field.as_str(), "partial_rotary_factor", "rotary_pct"].into_iter().find(|f| config.get(f).is_some());
        let Some(field) = found else { return Ok(head_dim) };
        // The sliver of slack keeps a share that was written as a quotient from losing a channel.
        let rotated = (head_dim as f64 * config.number_or(field, 1.0)? + 1e-9).floor();
        if rotated >= 2.0 && rotated <= head_dim as f64 && rotated % 2.0 == 0.0 {
            return Ok(rotated as usize);
        }
        Err(config.error(
            field,
            format!("turns {rotated} of a head's {head_dim} channels; it must be an even number from 2 on"),
        ))
    }
}

/// Reads the rotary embedding of heads of `head_dim` channels.
///
/// # Errors
/// If a field is malformed or the kind of scaling is unknown.
pub fn read(config: &Config, place: Place<'_>, head_dim: usize, context: usize) -> Result<RopeSpec> {
    let (theta, section) = (place.theta(config)?, place.section);
    // No head is that wide, and a table is about to be made of it.
    if head_dim > 1 << 16 {
        return Err(config.error("head_dim", format!("of {head_dim} is wider than any head")));
    }
    let rotated = place.rotated(config, head_dim)?;
    if rotated % 2 != 0 {
        return Err(config.error("head_dim", format!("is {head_dim}; heads that turn have an even number of channels")));
    }
    let field = |name: &str| format!("{section}.{name}");
    let base = inverse_frequencies(theta, rotated);
    let plain = |inverse_frequencies, scale| RopeSpec { rotated, inverse_frequencies, scale, longer: None };
    let factor = || match config.number_or_none(&field("factor"))? {
        Some(f) if f > 0.0 => Ok(f),
        _ => Err(config.error(&field("factor"), "must be a positive number")),
    };
    match place.kind(config)? {
        "default" | "mrope" => Ok(plain(base, 1.0)),
        "linear" => {
            let factor = factor()? as f32;
            Ok(plain(base.iter().map(|f| f / factor).collect(), 1.0))
        }
        "dynamic" if rotated > 2 => {
            let longer = Longer { beyond: context, frequencies: Stretch::Dynamic { theta, factor: factor()? } };
            Ok(RopeSpec { longer: Some(longer), ..plain(base, 1.0) })
        }
        "llama3" => Ok(plain(llama3(config, section, &base, factor()?)?, 1.0)),
        "yarn" => yarn(config, section, theta, rotated, context, factor()?),
        "longrope" | "su" => longrope(config, section, &base, rotated, context),
        other => Err(config.error(
            &field("rope_type"),
            format!("is {other:?}; planish knows default, linear, dynamic, llama3, yarn and longrope"),
        )),
    }
}

/// Llama 3's scaling: long wavelengths are stretched, short ones kept, those between blended.
fn llama3(config: &Config, section: &str, base: &[f32], factor: f64) -> Result<Vec<f32>> {
    let field = |name: &str| format!("{section}.{name}");
    let low = config.number_or(&field("low_freq_factor"), 1.0)?;
    let high = config.number_or(&field("high_freq_factor"), 4.0)?;
    let old = config.number_or(&field("original_max_position_embeddings"), 8192.0)?;
    let scaled = base.iter().map(|f| {
        let wavelength = 2.0 * std::f64::consts::PI / f64::from(*f);
        if wavelength < old / high {
            *f
        } else if wavelength > old / low {
            (f64::from(*f) / factor) as f32
        } else {
            let smooth = (old / wavelength - low) / (high - low);
            ((1.0 - smooth) * f64::from(*f) / factor + smooth * f64::from(*f)) as f32
        }
    });
    Ok(scaled.collect())
}

/// YaRN (arXiv 2309.00071).
fn yarn(config: &Config, section: &str, theta: f64, rotated: usize, context: usize, factor: f64) -> Result<RopeSpec> {
    let field = |name: &str| format!("{section}.{name}");
    let old = config.number_or(&field("original_max_position_embeddings"), context as f64)?;
    let fast = config.number_or(&field("beta_fast"), 32.0)?;
    let slow = config.number_or(&field("beta_slow"), 1.0)?;
    let mscale = |scale: f64, m: f64| if scale <= 1.0 { 1.0 } else { 0.1 * m * scale.ln() + 1.0 };
    let scale = match config.number_or_none(&field("attention_factor"))? {
        Some(scale) => scale,
        None => match (config.number_or_none(&field("mscale"))?, config.number_or_none(&field("mscale_all_dim"))?) {
            (Some(a), Some(b)) if a != 0.0 && b != 0.0 => mscale(factor, a) / mscale(factor, b),
            _ => mscale(factor, 1.0),
        },
    };
    let dim = rotated as f64;
    let turns = |n: f64| dim * (old / (n * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (turns(fast), turns(slow));
    if config.flag_or(&field("truncate"), true)? {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001;
    }
    let base = inverse_frequencies(theta, rotated);
    let mix = |(i, f): (usize, &f32)| {
        let ramp = (((i as f64 - low) / (high - low)).clamp(0.0, 1.0)) as f32;
        let keep = 1.0 - ramp;
        (f / factor as f32) * (1.0 - keep) + f * keep
    };
    let inverse_frequencies = base.iter().enumerate().map(mix).collect();
    Ok(RopeSpec { rotated, inverse_frequencies, scale: scale as f32, longer: None })
}

/// LongRoPE (arXiv 2402.13753): one list of factors up to the trained length, another beyond.
fn longrope(config: &Config, section: &str, base: &[f32], rotated: usize, context: usize) -> Result<RopeSpec> {
    let field = |name: &str| format!("{section}.{name}");
    let old = match config.size_or_none("original_max_position_embeddings")? {
        Some(n) => n,
        None => config.size_or(&field("original_max_position_embeddings"), context)?,
    };
    let list = |name: &str| match config.numbers(&field(name))? {
        Some(list) if list.len() == base.len() => {
            Ok(base.iter().zip(&list).map(|(f, s)| f / *s as f32).collect::<Vec<f32>>())
        }
        _ => Err(config.error(&field(name), format!("must be a list of {} numbers", base.len()))),
    };
    let stretch = match config.number_or_none(&field("factor"))? {
        Some(f) if config.get("original_max_position_embeddings").is_none() => f,
        _ => context as f64 / old as f64,
    };
    let scale = match config.number_or_none(&field("attention_factor"))? {
        Some(scale) => scale,
        None if stretch <= 1.0 => 1.0,
        None => (1.0 + stretch.ln() / (old as f64).ln()).sqrt(),
    };
    let longer = Some(Longer { beyond: old, frequencies: Stretch::Fixed(list("long_factor")?) });
    Ok(RopeSpec { rotated, inverse_frequencies: list("short_factor")?, scale: scale as f32, longer })
}
