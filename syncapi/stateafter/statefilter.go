package stateafter

import (
	"slices"
	"strings"

	"github.com/matrix-org/dendrite/syncapi/synctypes"
	"github.com/tidwall/gjson"
)

// wanted reports whether a client's filter admits a state event. Dendrite's own filters do not help: they look at the event that caused a
// change of state, and not at the state events that it added.
func wanted(filter *synctypes.StateFilter, roomID, sender, eventType string, content []byte) bool {
	switch {
	case filter.Rooms != nil && !slices.Contains(*filter.Rooms, roomID),
		filter.NotRooms != nil && slices.Contains(*filter.NotRooms, roomID),
		filter.Senders != nil && !slices.Contains(*filter.Senders, sender),
		filter.NotSenders != nil && slices.Contains(*filter.NotSenders, sender),
		filter.Types != nil && !matchesType(*filter.Types, eventType),
		filter.NotTypes != nil && matchesType(*filter.NotTypes, eventType):
		return false
	}
	return filter.ContainsURL == nil || *filter.ContainsURL == gjson.GetBytes(content, "url").Exists()
}

// matchesType reports whether an event type matches one of the patterns, in which * stands for any characters.
func matchesType(patterns []string, eventType string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool { return matches(pattern, eventType) })
}

func matches(pattern, text string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == text
	}
	first, last := parts[0], parts[len(parts)-1]
	if len(text) < len(first)+len(last) || !strings.HasPrefix(text, first) || !strings.HasSuffix(text, last) {
		return false
	}
	text = text[len(first) : len(text)-len(last)]
	for _, part := range parts[1 : len(parts)-1] {
		_, rest, ok := strings.Cut(text, part)
		if !ok {
			return false
		}
		text = rest
	}
	return true
}
