package roomserver

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/jsondepth"
)

// journal is a roomserver, a watcher and a hook that record the order of their calls.
type journal struct {
	api.RoomserverInternalAPI
	calls  []string
	errMsg string
	state  []*types.HeaderedEvent
}

func (j *journal) InputRoomEvents(_ context.Context, _ *api.InputRoomEventsRequest, res *api.InputRoomEventsResponse) {
	j.calls = append(j.calls, "input")
	res.ErrMsg = j.errMsg
}

func (j *journal) StateComes(_ context.Context, s expiration.StateKey, _ string) error {
	j.calls = append(j.calls, "comes "+s.RoomID+" "+s.Type+" "+s.Key)
	return errors.New("what fails here stops nothing")
}

func (j *journal) StateSent(s expiration.StateKey, _ string) {
	j.calls = append(j.calls, "sent "+s.RoomID+" "+s.Type+" "+s.Key)
}

func (j *journal) hook(err error) *expiration.Hook {
	return &expiration.Hook{
		Before: func(_ context.Context, b expiration.Built) error {
			j.calls = append(j.calls, "before "+b.EventID)
			return err
		},
		After: func(_ context.Context, sent bool) { j.calls = append(j.calls, fmt.Sprint("after ", sent)) },
	}
}

// reference is an event ID as it appears in prev_events and auth_events.
const reference = "$0123456789012345678901234567890123456789012"

// newEvent returns an event of room version 10.
func newEvent(t *testing.T, stateKey, content string) *types.HeaderedEvent {
	t.Helper()
	version, err := gomatrixserverlib.GetRoomVersion(gomatrixserverlib.RoomVersionV10)
	require.NoError(t, err)
	pdu, err := version.NewEventFromTrustedJSON([]byte(fmt.Sprintf(`{"auth_events":[%[1]q,%[1]q],"content":%[2]s,"depth":5,`+
		`"hashes":{"sha256":"x"},"origin_server_ts":1,"prev_events":[%[1]q],"room_id":"!room:example.org",`+
		`"sender":"@alice:example.org","signatures":{}%[3]s,"type":"m.call.member"}`, reference, content, stateKey)), false)
	require.NoError(t, err)
	return &types.HeaderedEvent{PDU: pdu}
}

// deep returns a JSON object with the given number of levels.
func deep(levels int) string {
	return strings.Repeat(`{"a":`, levels) + "1" + strings.Repeat("}", levels)
}

func TestInputRoomEvents(t *testing.T) {
	state := newEvent(t, `,"state_key":"key"`, `{}`)
	message := newEvent(t, "", `{}`)
	comes, sent := "comes !room:example.org m.call.member key", "sent !room:example.org m.call.member key"
	for name, test := range map[string]struct {
		event  *types.HeaderedEvent
		kind   api.Kind
		async  bool
		errMsg string
		hooked bool
		before error
		want   []string
	}{
		"state":               {event: state, kind: api.KindNew, want: []string{comes, "input", sent}},
		"message":             {event: message, kind: api.KindNew, want: []string{"input"}},
		"old state":           {event: state, kind: api.KindOld, want: []string{"input"}},
		"outlier":             {event: state, kind: api.KindOutlier, want: []string{"input"}},
		"asynchronous":        {event: state, kind: api.KindNew, async: true, want: []string{"input"}},
		"refused":             {event: state, kind: api.KindNew, errMsg: "no", want: []string{comes, "input"}},
		"nested too deeply":   {event: newEvent(t, "", deep(jsondepth.Max+1)), kind: api.KindNew, async: true, errMsg: "the event is nested more deeply than 200 levels", want: nil},
		"nested deeply":       {event: newEvent(t, "", deep(jsondepth.Max)), kind: api.KindNew, async: true, want: []string{"input"}},
		"hooked state":        {event: state, kind: api.KindNew, hooked: true, want: []string{"before " + state.EventID(), comes, "input", sent, "after true"}},
		"hooked and refused":  {event: state, kind: api.KindNew, hooked: true, errMsg: "no", want: []string{"before " + state.EventID(), comes, "input", "after false"}},
		"hooked, called off":  {event: message, kind: api.KindNew, hooked: true, before: errors.New("limit"), want: []string{"before " + message.EventID()}},
		"hooked, and message": {event: message, kind: api.KindNew, hooked: true, want: []string{"before " + message.EventID(), "input", "after true"}},
	} {
		t.Run(name, func(t *testing.T) {
			j := &journal{errMsg: test.errMsg}
			wrapper := NewAPI(j)
			wrapper.Watch(j)
			hook, rsAPI := j.hook(test.before), api.ClientRoomserverAPI(wrapper)
			if test.hooked {
				_, rsAPI = wrapper.Hooked(httptest.NewRequest(http.MethodPut, "/", nil), hook)
			}
			var res api.InputRoomEventsResponse
			rsAPI.InputRoomEvents(t.Context(), &api.InputRoomEventsRequest{
				InputRoomEvents: []api.InputRoomEvent{{Kind: test.kind, Event: test.event}}, Asynchronous: test.async,
			}, &res)
			require.Equal(t, test.want, j.calls)
			require.Equal(t, test.hooked, hook.Called)
			require.Equal(t, test.before, hook.Err)
			require.Equal(t, test.before != nil || test.errMsg != "", res.Err() != nil, "the send must fail if it did not happen")
		})
	}
}
