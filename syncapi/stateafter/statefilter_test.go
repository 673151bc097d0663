package stateafter

import (
	"testing"

	"github.com/matrix-org/dendrite/syncapi/synctypes"
	"github.com/stretchr/testify/require"
)

func TestStateFilter(t *testing.T) {
	for pattern, matched := range map[string]map[string]bool{
		"m.room.topic": {"m.room.topic": true, "m.room.topics": false, "": false},
		"*":            {"": true, "x": true},
		"m.*":          {"m.": true, "m.x": true, "am.x": false, "m": false},
		"*.x":          {".x": true, "a.x.x": true, "x": false},
		"a*b*a":        {"aba": true, "axbxa": true, "aa": false, "a": false, "axxa": false},
		"a*a":          {"a": false, "aa": true},
		"m.room.top_c": {"m.room.topic": false},
	} {
		for eventType, want := range matched {
			require.Equal(t, want, matches(pattern, eventType), "%q %q", pattern, eventType)
		}
	}
	none := &synctypes.StateFilter{Types: &[]string{}}
	require.False(t, wanted(none, roomID, alice, "x", nil))
}
