package roomserver

import (
	"context"
	"fmt"
	"testing"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

func (j *journal) QueryLatestEventsAndState(
	_ context.Context, req *api.QueryLatestEventsAndStateRequest, res *api.QueryLatestEventsAndStateResponse,
) error {
	j.calls = append(j.calls, fmt.Sprint("latest ", req.StateToFetch))
	res.StateEvents = append(res.StateEvents, j.state...)
	return nil
}

func (j *journal) QueryCurrentState(
	context.Context, *api.QueryCurrentStateRequest, *api.QueryCurrentStateResponse,
) error {
	j.calls = append(j.calls, "current")
	return nil
}

// The ground is queried together with the prev events, and Dendrite sees only the state that it asked for.
func TestGround(t *testing.T) {
	key := "key"
	create := gomatrixserverlib.StateKeyTuple{EventType: "m.room.create"}
	member := gomatrixserverlib.StateKeyTuple{EventType: "m.call.member", StateKey: key}
	closing := newEvent(t, `,"state_key":"key"`, `{}`)
	other := newEvent(t, `,"state_key":"other"`, `{}`)
	for name, test := range map[string]struct {
		stateKey *string
		need     []gomatrixserverlib.StateKeyTuple
		want     []string
		events   []*types.HeaderedEvent
		current  bool
	}{
		"message":          {nil, []gomatrixserverlib.StateKeyTuple{create}, []string{"current", "latest [{m.room.create }]", "current"}, []*types.HeaderedEvent{other, closing}, false},
		"state":            {&key, []gomatrixserverlib.StateKeyTuple{create}, []string{"latest [{m.room.create } {m.call.member key}]", "current"}, []*types.HeaderedEvent{other}, true},
		"needed by itself": {&key, []gomatrixserverlib.StateKeyTuple{member}, []string{"latest [{m.call.member key}]", "current"}, []*types.HeaderedEvent{other, closing}, true},
	} {
		t.Run(name, func(t *testing.T) {
			j := &journal{state: []*types.HeaderedEvent{other, closing}}
			g := newGround(expiration.Event{Type: "m.call.member", StateKey: test.stateKey})
			wrapper := &oneSend{ClientRoomserverAPI: NewAPI(j), ground: g}
			require.NoError(t, wrapper.QueryCurrentState(t.Context(), nil, nil))
			var res api.QueryLatestEventsAndStateResponse
			require.NoError(t, wrapper.QueryLatestEventsAndState(t.Context(), &api.QueryLatestEventsAndStateRequest{StateToFetch: test.need}, &res))
			require.NoError(t, wrapper.QueryCurrentState(t.Context(), nil, nil))
			require.Equal(t, test.want, j.calls)
			require.Equal(t, test.events, res.StateEvents)
			require.Equal(t, test.current, g != nil && g.current == closing.PDU)
		})
	}
}
