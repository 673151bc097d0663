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
	"github.com/matrix-org/util"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// verdict distinguishes a fault of the roomserver, Dendrite's answer about the event, and a send that the hook called off.
func TestVerdict(t *testing.T) {
	fault, off := errors.New("disk full"), errors.New("the timer was refreshed")
	refused, unsendable := new(*expiration.RefusedError), new(*expiration.UnsendableError)
	for name, test := range map[string]struct {
		send oneSend
		off  error
		code int
		is   error // or
		as   any
	}{
		"bad content":            {code: 400, as: refused},
		"forbidden":              {code: 403, as: refused},
		"no such room":           {code: 404, as: refused},
		"too large":              {code: 413, as: refused},
		"no verdict":             {code: 500, as: unsendable},
		"rejected by the room":   {send: oneSend{rejected: true}, code: 500, as: unsendable},
		"fault":                  {send: oneSend{fault: fault}, code: 500, is: fault},
		"fault that looks final": {send: oneSend{fault: fault}, code: 400, is: fault},
		"called off":             {off: off, code: 500, is: off},
	} {
		t.Run(name, func(t *testing.T) {
			test.send.hook = &expiration.Hook{Err: test.off}
			err := test.send.verdict(util.JSONResponse{Code: test.code, JSON: spec.Unknown("")})
			if test.is != nil {
				require.Equal(t, test.is, err)
			} else {
				require.ErrorAs(t, err, test.as)
			}
		})
	}
	limited := oneSend{hook: &expiration.Hook{}}
	err := limited.verdict(util.JSONResponse{Code: 429})
	require.False(t, errors.As(err, refused) || errors.As(err, unsendable), "a limit passes")
}

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

func TestRunningContent(t *testing.T) {
	got, err := runningContent([]byte(`{"a":[1,{"b":"<"}],"m.will_expire":30}`))
	require.NoError(t, err)
	require.JSONEq(t, `{"a":[1,{"b":"<"}],"m.will_expire":"running"}`, string(got))
	_, err = runningContent([]byte(`[]`))
	require.Error(t, err)
}
