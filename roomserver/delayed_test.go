package roomserver

import (
	"context"
	"errors"
	"testing"

	fsapi "github.com/matrix-org/dendrite/federationapi/api"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// stateful is a roomserver that has one piece of state, if any.
type stateful struct {
	api.RoomserverInternalAPI
	current           *types.HeaderedEvent
	failed, forgotten error
}

func (s *stateful) SetFederationAPI(fsapi.RoomserverFederationAPI, *gomatrixserverlib.KeyRing) {}

func (s *stateful) QueryCurrentState(
	_ context.Context, req *api.QueryCurrentStateRequest, res *api.QueryCurrentStateResponse,
) error {
	res.StateEvents = map[gomatrixserverlib.StateKeyTuple]*types.HeaderedEvent{}
	if s.current != nil && req.StateTuples[0] == (gomatrixserverlib.StateKeyTuple{EventType: "m.call.member", StateKey: "key"}) {
		res.StateEvents[req.StateTuples[0]] = s.current
	}
	return s.failed
}

func (s *stateful) QueryUserIDForSender(_ context.Context, _ spec.RoomID, id spec.SenderID) (*spec.UserID, error) {
	if s.forgotten != nil {
		return nil, s.forgotten
	}
	return spec.NewUserID(string(id), true)
}

// Another user's state overtakes a delayed event, unless it was already the current state when the event was scheduled.
func TestOvertaken(t *testing.T) {
	failed := errors.New("disk full")
	current := newEvent(t, `,"state_key":"key"`, `{}`) // Alice's
	for name, test := range map[string]struct {
		roomserver stateful
		sender     string
		key, over  string
		want       bool
		err        error
	}{
		"no state":         {stateful{}, "@bob:example.org", "key", "", false, nil},
		"another's":        {stateful{current: current}, "@bob:example.org", "key", "", true, nil},
		"another's, after": {stateful{current: current}, "@bob:example.org", "key", "$before", true, nil},
		"another's before": {stateful{current: current}, "@bob:example.org", "key", current.EventID(), false, nil},
		"its owner's":      {stateful{current: current}, "@alice:example.org", "key", "$before", false, nil},
		"elsewhere":        {stateful{current: current}, "@bob:example.org", "other", "", false, nil},
		"unknown state":    {stateful{current: current, failed: failed}, "@bob:example.org", "key", "", false, failed},
		"unknown sender":   {stateful{current: current, forgotten: failed}, "@bob:example.org", "key", "", false, failed},
	} {
		t.Run(name, func(t *testing.T) {
			wrapper := NewAPI(&test.roomserver)
			wrapper.SetFederationAPI(nil, nil)
			c := NewCloser(nil, wrapper)
			s := expiration.StateKey{RoomID: "!room:example.org", Type: "m.call.member", Key: test.key}
			got, err := c.Replaced(t.Context(), expiration.Timer{
				Event:   expiration.Event{RoomID: s.RoomID, Type: s.Type, StateKey: &s.Key, Sender: test.sender},
				Delayed: &expiration.Delayed{Over: test.over},
			})
			require.ErrorIs(t, err, test.err)
			require.Equal(t, test.want, got)
			if test.roomserver.forgotten != nil {
				return
			}
			eventID, err := c.CurrentState(t.Context(), s)
			require.ErrorIs(t, err, test.err)
			require.Equal(t, test.roomserver.current != nil && test.key == "key" && err == nil, eventID == current.EventID())
		})
	}
}
