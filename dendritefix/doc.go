// Package dendritefix mends from outside what is wrong in Dendrite v0.13.8 and gomatrixserverlib, one file a fault. Each says
// under which condition it can go.
package dendritefix
