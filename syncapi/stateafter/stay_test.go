package stateafter

import (
	"testing"

	rstypes "github.com/matrix-org/dendrite/roomserver/types"
	"github.com/stretchr/testify/require"
)

func TestFollow(t *testing.T) {
	h := &history{t: t, roomserver: &roomserver{map[string]*rstypes.HeaderedEvent{}}}
	in, out := h.event("m.room.member", bob, bob, `{"membership":"join"}`), h.event("m.room.member", bob, bob, `{"membership":"leave"}`)
	own := map[string]*rstypes.HeaderedEvent{"in": in, "in again": in, "out": out}
	came, went := change{position: 1, added: []string{"in"}}, change{position: 2, added: []string{"out"}, removed: []string{"in"}}
	again := change{position: 3, added: []string{"in again"}, removed: []string{"out"}}
	named := change{position: 4, added: []string{"in"}, removed: []string{"in again"}}
	for _, test := range []struct {
		changes []change
		want    stay
	}{
		{nil, stay{}},
		{[]change{{position: 1, added: []string{"other"}}}, stay{}},
		{[]change{came}, stay{entered: true, last: in}},
		{[]change{came, went}, stay{entered: true, left: 2, last: out}},
		{[]change{went}, stay{left: 2, last: out}},
		{[]change{went, again}, stay{entered: true, last: in}},
		{[]change{again, named}, stay{entered: true, last: in}},
		{[]change{named}, stay{last: in}},
		{[]change{{position: 5, removed: []string{"in"}}}, stay{left: 5}},
	} {
		require.Equal(t, test.want, follow(test.changes, own))
	}
}
