package config

import (
	"strings"
)

// nearest returns what an unknown key at the top of dendrite.yaml was meant to be: one of our sections, or a key that belongs into one
// of them. It returns "" if that is neither. Other keys there are Dendrite's, or nobody's, and Dendrite lets those pass.
func nearest(key string) string {
	const tolerance = 2
	key = strings.ToLower(strings.ReplaceAll(key, "-", "_"))
	if strings.HasPrefix(key, "expir") {
		return "expiration"
	}
	// Not database and rate_limiting, which sections of Dendrite's have too.
	for _, ours := range []string{
		"expiration", "matrix_rtc", "expiration.max_duration", "expiration.max_running_per_user", "expiration.delayed_events",
		"expiration.restart_grace", "matrix_rtc.transports",
	} {
		if distance(key, ours[strings.LastIndex(ours, ".")+1:]) <= tolerance {
			return ours
		}
	}
	return ""
}

// distance returns by how many bytes, added, removed or changed, two words differ.
func distance(a, b string) int {
	row := make([]int, len(b)+1) // from the part of a that was looked at, to each beginning of b
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		before := row[0]
		row[0]++
		for j := range len(b) {
			change := before
			if a[i] != b[j] {
				change++
			}
			before = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
