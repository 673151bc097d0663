package expiration

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// isUpon reads prev events in the format of each room version.
func TestIsUpon(t *testing.T) {
	for pdu, want := range map[string]bool{
		`{"prev_events":["$a","$before","$b"]}`:                      true,
		`{"prev_events":[["$before:example.org",{"sha256":"abc"}]]}`: false,
		`{"prev_events":[["$a",{"sha256":"abc"}],["$before",{}]]}`:   true,
		`{"prev_events":["$a"],"auth_events":["$before"]}`:           false,
		`{"prev_events":["$before2"]}`:                               false,
		`{"prev_events":[]}`:                                         false,
		``:                                                           false,
	} {
		require.Equal(t, want, SignedEvent{PDU: []byte(pdu)}.isUpon("$before"), pdu)
	}
}
