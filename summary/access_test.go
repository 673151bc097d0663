package summary

import (
	"testing"

	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/stretchr/testify/require"
)

// The version of a room decides what its join rule means.
func TestMeaning(t *testing.T) {
	for _, test := range []struct {
		rule  string
		since int
	}{{spec.Public, 1}, {spec.Invite, 1}, {spec.Knock, 7}, {spec.Restricted, 8}, {spec.KnockRestricted, 10}} {
		for i, version := range []gomatrixserverlib.RoomVersion{"1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11"} {
			want := test.rule
			if i+1 < test.since {
				want = spec.Invite
			}
			require.Equal(t, want, meaning(test.rule, version), "%s in %s", test.rule, version)
		}
	}
}
