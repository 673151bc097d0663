package config

import (
	"strings"
)

// nearest guesses what an unknown key at the top of dendrite.yaml was meant to be: one of our sections, or a key of one of them. It returns
// "" if the key resembles none. Such a key is Dendrite's or unknown, and Dendrite accepts both.
func nearest(key string) string {
	const tolerance = 2
	key = strings.ToLower(strings.ReplaceAll(key, "-", "_"))
	if strings.HasPrefix(key, "expir") {
		return "expiration"
	}
	// Without database and rate_limiting, because sections of Dendrite have these keys too.
	for _, ours := range []string{
		"expiration", "matrix_rtc", "expiration.max_duration", "expiration.max_running_per_user", "expiration.delayed_events",
		"expiration.restart_grace", "matrix_rtc.livekit", "matrix_rtc.transports",
	} {
		if distance(key, ours[strings.LastIndex(ours, ".")+1:]) <= tolerance {
			return ours
		}
	}
	return ""
}

// distance returns how many bytes must be added, removed or changed to turn one word into the other.
func distance(a, b string) int {
	row := make([]int, len(b)+1) // row[j] is the distance from the bytes of a so far to b[:j]
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
