package roomserver

import (
	"context"
	"encoding/json"
	"testing"

	fsapi "github.com/matrix-org/dendrite/federationapi/api"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/stretchr/testify/require"
)

// federated is a roomserver that keeps its federation API.
type federated struct {
	journal
	fsAPI fsapi.RoomserverFederationAPI
}

// remote is a federation API that always fetches the same event.
type remote struct {
	fsapi.RoomserverFederationAPI
	event string
}

func (f *federated) SetFederationAPI(fsAPI fsapi.RoomserverFederationAPI, _ *gomatrixserverlib.KeyRing) {
	f.fsAPI = fsAPI
}

func (r *remote) GetEvent(context.Context, spec.ServerName, spec.ServerName, string) (gomatrixserverlib.Transaction, error) {
	return gomatrixserverlib.Transaction{PDUs: []json.RawMessage{json.RawMessage(r.event)}}, nil
}

func (f *federated) QueryRoomVersionForRoom(context.Context, string) (gomatrixserverlib.RoomVersion, error) {
	return gomatrixserverlib.RoomVersionV11, nil
}

// A redaction is noted whether it is fetched or arrives as input. Another event is noted only if its input is asynchronous.
func TestIntakeNotesWhatComes(t *testing.T) {
	f, r := &federated{}, &remote{}
	i := NewIntake(f, nil, nil)
	i.SetFederationAPI(r, nil)
	// noted reports what Intake noted during a call.
	noted := func(come func()) (comes, redacted bool) {
		look, _ := i.settled.begin(testRoom)
		i.settled.dealtWith(testRoom, look)
		come()
		_, empty := i.settled.begin(testRoom)
		return !empty, i.settled.mayBeRedacted(testRoom)
	}
	is := func(wantComes, wantRedacted bool, come func()) {
		t.Helper()
		comes, redacted := noted(come)
		require.Equal(t, wantComes, comes)
		require.Equal(t, wantRedacted, redacted)
	}
	fetch := func(eventType string) func() {
		return func() {
			r.event = `{"room_id":"` + testRoom + `","type":"` + eventType + `","content":{}}`
			_, err := f.fsAPI.GetEvent(t.Context(), "", "", "")
			require.NoError(t, err)
		}
	}
	input := func(async bool) func() {
		return func() {
			i.InputRoomEvents(t.Context(), &api.InputRoomEventsRequest{
				Asynchronous: async, InputRoomEvents: []api.InputRoomEvent{{Kind: api.KindNew, Event: newEvent(t, "", `{}`)}},
			}, &api.InputRoomEventsResponse{})
		}
	}
	is(true, true, fetch(spec.MRoomRedaction))
	is(false, false, fetch("m.room.message"))
	is(true, false, input(true))
	is(false, false, input(false))
}
