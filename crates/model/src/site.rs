//! `Site`: the address of one weight, the same in every family, file, recipe and report.

use std::{fmt, str::FromStr};

/// What a weight does in a decoder, whatever its family calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Token embedding `[vocab, dim]`.
    Embed,
    /// Learned positions `[context, dim]`.
    Position,
    /// Norm before attention.
    AttnNorm,
    /// Query projection.
    Q,
    /// Key projection.
    K,
    /// Value projection.
    V,
    /// Norm of each query head.
    QNorm,
    /// Norm of each key head.
    KNorm,
    /// Output projection of attention.
    O,
    /// Norm of attention's output, before it joins the residual.
    PostAttnNorm,
    /// Norm before the feed-forward network.
    MlpNorm,
    /// Gate projection.
    Gate,
    /// Up projection.
    Up,
    /// Down projection.
    Down,
    /// Norm of the feed-forward output, before it joins the residual.
    PostMlpNorm,
    /// Norm before the head.
    FinalNorm,
    /// Output head `[vocab, dim]`; where embeddings are tied it is the embedding.
    Head,
}

/// Every role with its name in recipes and reports.
pub const ROLES: &[(Role, &str)] = &[
    (Role::Embed, "embed"),
    (Role::Position, "position"),
    (Role::AttnNorm, "attn_norm"),
    (Role::Q, "q"),
    (Role::K, "k"),
    (Role::V, "v"),
    (Role::QNorm, "q_norm"),
    (Role::KNorm, "k_norm"),
    (Role::O, "o"),
    (Role::PostAttnNorm, "post_attn_norm"),
    (Role::MlpNorm, "mlp_norm"),
    (Role::Gate, "gate"),
    (Role::Up, "up"),
    (Role::Down, "down"),
    (Role::PostMlpNorm, "post_mlp_norm"),
    (Role::FinalNorm, "final_norm"),
    (Role::Head, "head"),
];

impl Role {
    /// Its name.
    pub fn name(self) -> &'static str {
        ROLES.iter().find(|(r, _)| *r == self).map_or("", |(_, n)| n)
    }

    /// Is it one of the vectors that scale a normalised row?
    pub fn is_norm(self) -> bool {
        matches!(
            self,
            Role::AttnNorm
                | Role::QNorm
                | Role::KNorm
                | Role::PostAttnNorm
                | Role::MlpNorm
                | Role::PostMlpNorm
                | Role::FinalNorm
        )
    }

    /// Does it stand once in the model, outside the blocks?
    pub fn is_edge(self) -> bool {
        matches!(self, Role::Embed | Role::Position | Role::FinalNorm | Role::Head)
    }
}

/// The address of one weight: `3.q`, `embed`, `head`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Site {
    /// Number of the block, from 0; `None` at the edges of the model.
    pub layer: Option<u16>,
    /// What it does there.
    pub role: Role,
}

impl Site {
    /// The token embedding.
    pub const EMBED: Site = Site { layer: None, role: Role::Embed };
    /// The learned positions.
    pub const POSITION: Site = Site { layer: None, role: Role::Position };
    /// The last norm.
    pub const FINAL_NORM: Site = Site { layer: None, role: Role::FinalNorm };
    /// The output head.
    pub const HEAD: Site = Site { layer: None, role: Role::Head };

    /// A weight of a block.
    pub fn of(layer: u16, role: Role) -> Site {
        Site { layer: Some(layer), role }
    }

    /// What a part of its matrix (see `tensor::Weight::parts`) is called: `3.q` the whole, `3.q.up` a factor.
    pub fn part_name(self, part: &str) -> String {
        if part.is_empty() { self.to_string() } else { format!("{self}.{part}") }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.layer {
            Some(layer) => write!(f, "{layer}.{}", self.role.name()),
            None => f.write_str(self.role.name()),
        }
    }
}

/// A text that names no site.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[error("{0:?} names no site; sites read like `3.q`, `0.down`, `embed` or `head`")]
pub struct NoSite(String);

impl FromStr for Site {
    type Err = NoSite;

    fn from_str(text: &str) -> Result<Site, NoSite> {
        let (layer, name) = match text.split_once('.') {
            Some((layer, name)) => (Some(layer.parse::<u16>().map_err(|_| NoSite(text.into()))?), name),
            None => (None, text),
        };
        let role = ROLES.iter().find(|(_, n)| *n == name).map(|(r, _)| *r).ok_or_else(|| NoSite(text.into()))?;
        if role.is_edge() != layer.is_none() {
            return Err(NoSite(text.into()));
        }
        Ok(Site { layer, role })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for (role, _) in ROLES {
            let site = if role.is_edge() { Site { layer: None, role: *role } } else { Site::of(7, *role) };
            assert_eq!(site.to_string().parse::<Site>(), Ok(site));
        }
        for bad in ["q", "7.embed", "x.q", "1.qq", "", "."] {
            assert!(bad.parse::<Site>().unwrap_err().to_string().contains("names no site"), "{bad}");
        }
    }
}
