// Package dendritefix fixes faults of Dendrite v0.13.8 and gomatrixserverlib without changing their code. Each fault has a file, which says
// under which condition it can go. The package knows nothing of timers.
package dendritefix
