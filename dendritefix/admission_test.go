package dendritefix

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"

	fsapi "github.com/matrix-org/dendrite/federationapi/api"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/fclient"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/jsondepth"
)

func TestAdmitReasons(t *testing.T) {
	for _, test := range []struct {
		event string
		want  error
	}{
		{``, nil},
		{`{"content":{"body":"\u0000"},"type":"m.room.message"}`, nil},
		{`{"content":` + deep(jsondepth.Max) + `}`, nil},
		{`{"content":` + deep(jsondepth.Max+1) + `}`, errEventTooDeep},
		{`{"content":{},"unsigned":` + deep(jsondepth.Max+1) + `}`, errEventTooDeep},
		{`{"content":{"m.relates_to":{"event_id":"\u0000","rel_type":"x"}}}`, errUnstorable},
		{`{"content":{},"redacts":"$\u0000"}`, errUnstorable},
		{`{"content":{"redacts":"$\u0000"}}`, errUnstorable},
	} {
		require.Equal(t, test.want, admit([]byte(test.event)), "%.100s", test.event)
	}
}

// When a join brings the state of a room, one refused event does not keep the others out.
func TestAdmit(t *testing.T) {
	good, bad := callMember(t, `{}`), callMember(t, deep(jsondepth.Max+1))
	inputs := []api.InputRoomEvent{{Event: good}, {Event: bad}, {Event: good}}
	admitted, err := Admit(inputs)
	require.Equal(t, errEventTooDeep, err)
	require.Equal(t, []api.InputRoomEvent{{Event: good}, {Event: good}}, admitted)
	require.Len(t, inputs, 3, "the caller's list is as it was")
	admitted, err = Admit(inputs[:1])
	require.NoError(t, err)
	require.Len(t, admitted, 1)
}

// server is another server that answers every request with the same events.
type server struct {
	fsapi.RoomserverFederationAPI
	events []string
}

func answer[E ~[]byte](s *server) (events []E) {
	for _, e := range s.events {
		events = append(events, E(e))
	}
	return events
}

func (s *server) LookupMissingEvents(
	context.Context, spec.ServerName, spec.ServerName, string, fclient.MissingEvents, gomatrixserverlib.RoomVersion,
) (fclient.RespMissingEvents, error) {
	return fclient.RespMissingEvents{Events: answer[spec.RawJSON](s)}, nil
}

func (s *server) GetEventAuth(
	context.Context, spec.ServerName, spec.ServerName, gomatrixserverlib.RoomVersion, string, string,
) (fclient.RespEventAuth, error) {
	return fclient.RespEventAuth{AuthEvents: answer[spec.RawJSON](s)}, nil
}

func (s *server) GetEvent(context.Context, spec.ServerName, spec.ServerName, string) (gomatrixserverlib.Transaction, error) {
	return gomatrixserverlib.Transaction{PDUs: answer[json.RawMessage](s)}, nil
}

func (s *server) Backfill(
	context.Context, spec.ServerName, spec.ServerName, string, int, []string,
) (gomatrixserverlib.Transaction, error) {
	return gomatrixserverlib.Transaction{PDUs: answer[json.RawMessage](s)}, nil
}

func (s *server) LookupState(
	context.Context, spec.ServerName, spec.ServerName, string, string, gomatrixserverlib.RoomVersion,
) (gomatrixserverlib.StateResponse, error) {
	return &fclient.RespState{AuthEvents: answer[spec.RawJSON](s), StateEvents: answer[spec.RawJSON](s)}, nil
}

// Fetched events are checked like the events that other servers send, and each is reported.
func TestFetches(t *testing.T) {
	good := `{"content":{},"room_id":"!room:example.org","type":"m.room.redaction"}`
	bad := `{"content":{"m.relates_to":{"event_id":"\u0000"}},"room_id":"!room:example.org","type":"m.room.message"}`
	const room = "!room:example.org"
	reported := map[string]int{}
	f := AdmitFetched(&server{events: []string{bad, good, bad}}, func(roomID, eventType string) { reported[roomID+" "+eventType]++ })
	missing, _ := f.LookupMissingEvents(t.Context(), "", "", room, fclient.MissingEvents{}, "10")
	auth, _ := f.GetEventAuth(t.Context(), "", "", "10", room, "")
	event, _ := f.GetEvent(t.Context(), "", "", "")
	backfill, _ := f.Backfill(t.Context(), "", "", room, 1, nil)
	state, err := f.LookupState(t.Context(), "", "", room, "", "10")
	require.NoError(t, err)
	for i, events := range []any{
		missing.Events, auth.AuthEvents, event.PDUs, backfill.PDUs, state.GetAuthEvents(), state.GetStateEvents(),
	} {
		require.Equal(t, "["+good+"]", fmt.Sprintf("%s", events), i)
	}
	require.Equal(t, map[string]int{room + " m.room.redaction": 6, room + " m.room.message": 12}, reported)
}
