// Package dendritefix mends faults of Dendrite v0.13.8 and gomatrixserverlib from outside, one file a fault, and knows nothing of
// timers. Each file says under which condition it can go.
package dendritefix
