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

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/eventsize"
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

func (j *journal) StateSent(_ context.Context, s expiration.StateKey, _ string) error {
	j.calls = append(j.calls, "sent "+s.RoomID+" "+s.Type+" "+s.Key)
	return nil
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

func TestClosingContent(t *testing.T) {
	got, err := closingContent([]byte(`{"a":[1,{"b":"<"}],"m.relates_to":{"x":1},"m.will_expire":"running"}`), "$original", expiration.Ended)
	require.NoError(t, err)
	require.JSONEq(t, `{"a":[1,{"b":"<"}],"m.relates_to":{"event_id":"$original","rel_type":"m.expire.relationship"},"m.will_expire":"ended"}`, string(got))
	_, err = closingContent([]byte(`[]`), "$original", expiration.Ended)
	require.Error(t, err)
}

func TestIsRunning(t *testing.T) {
	require.True(t, isRunning(newEvent(t, "", `{"m.will_expire":"running"}`)))
	for _, content := range []string{`{}`, `{"m.will_expire":"ended"}`, `{"m.will_expire":5}`, `{"m.will_expire":{"a":"running"}}`} {
		require.False(t, isRunning(newEvent(t, "", content)), content)
	}
}

// The closing event of the largest accepted event fits, with as many references as Dendrite ever makes.
func TestClosable(t *testing.T) {
	event := func(size int) *types.HeaderedEvent {
		return newEvent(t, `,"state_key":"key"`, `{"m.will_expire":"running","x":"`+strings.Repeat("<", size)+`"}`)
	}
	largest := 0
	for size := 1 << 16; size > 0; size >>= 1 {
		if closable(event(largest + size)) {
			largest += size
		}
	}
	accepted := event(largest)
	content, err := closingContent(accepted.Content(), accepted.EventID(), expiration.Expired)
	require.NoError(t, err)
	content, err = gomatrixserverlib.CanonicalJSON(content)
	require.NoError(t, err)
	references := strings.Repeat(`"`+reference+`",`, eventsize.MaxPrevEvents+eventsize.MaxAuthEvents-3)
	closing := len(accepted.JSON()) - len(accepted.Content()) + len(content) + len(references) + len("9223372036854775807")
	require.LessOrEqual(t, closing, eventsize.Max)
	require.Greater(t, closing, eventsize.Max-10, "no more is refused than needs be")
}

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
