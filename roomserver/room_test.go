package roomserver

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"slices"
	"testing"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/fclient"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/stretchr/testify/require"
)

// graph is a roomserver with the events of one room, by their IDs, and its forward extremities. It is all that Dendrite's SendEvent needs.
type graph struct {
	membership
	events  map[string]*types.HeaderedEvent
	latest  []string
	state   []*types.HeaderedEvent
	failed  error
	queries []string // which queries were made
	input   func(e *types.HeaderedEvent)
}

func (g *graph) QueryLatestEventsAndState(
	_ context.Context, req *api.QueryLatestEventsAndStateRequest, res *api.QueryLatestEventsAndStateResponse,
) error {
	g.queries = append(g.queries, "latest")
	res.RoomExists, res.RoomVersion, res.LatestEvents, res.Depth = true, gomatrixserverlib.RoomVersionV10, g.latest, 9
	for _, e := range g.state {
		if slices.Contains(req.StateToFetch, tupleOf(e)) {
			res.StateEvents = append(res.StateEvents, e)
		}
	}
	return g.failed
}

func (g *graph) QueryCurrentState(_ context.Context, req *api.QueryCurrentStateRequest, res *api.QueryCurrentStateResponse) error {
	res.StateEvents = map[gomatrixserverlib.StateKeyTuple]*types.HeaderedEvent{}
	for _, e := range g.state {
		if slices.Contains(req.StateTuples, tupleOf(e)) {
			res.StateEvents[tupleOf(e)] = e
		}
	}
	return nil
}

func (g *graph) QueryEventsByID(_ context.Context, req *api.QueryEventsByIDRequest, res *api.QueryEventsByIDResponse) error {
	g.queries = append(g.queries, "events")
	for _, eventID := range req.EventIDs {
		if e := g.events[eventID]; e != nil {
			res.Events = append(res.Events, e)
		}
	}
	return nil
}

func (g *graph) QueryMembershipForUser(
	ctx context.Context, req *api.QueryMembershipForUserRequest, res *api.QueryMembershipForUserResponse,
) error {
	g.queries = append(g.queries, "membership")
	return g.membership.QueryMembershipForUser(ctx, req, res)
}

func (g *graph) QueryRoomVersionForRoom(context.Context, string) (gomatrixserverlib.RoomVersion, error) {
	return gomatrixserverlib.RoomVersionV10, nil
}

func (g *graph) QuerySenderIDForUser(_ context.Context, _ spec.RoomID, userID spec.UserID) (*spec.SenderID, error) {
	id := spec.SenderID(userID.String())
	return &id, nil
}

func (g *graph) QueryUserIDForSender(_ context.Context, _ spec.RoomID, id spec.SenderID) (*spec.UserID, error) {
	return spec.NewUserID(string(id), true)
}

func (g *graph) SigningIdentityFor(context.Context, spec.RoomID, spec.UserID) (fclient.SigningIdentity, error) {
	return fclient.SigningIdentity{
		PrivateKey: ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)), KeyID: "ed25519:1", ServerName: "example.org",
	}, nil
}

func (g *graph) InputRoomEvents(_ context.Context, req *api.InputRoomEventsRequest, _ *api.InputRoomEventsResponse) {
	g.input(req.InputRoomEvents[0].Event)
}

// outbox returns an outbox for the room of g.
func (g *graph) outbox() *Outbox {
	wrapper := NewAPI(g)
	wrapper.Watch(&g.journal)
	return NewOutbox(&config.ClientAPI{}, wrapper)
}

// add adds an event with the given prev event, and returns its ID.
func (g *graph) add(t *testing.T, depth int, prev string) string {
	t.Helper()
	e := pduOf(t, fmt.Sprintf(`{"auth_events":[],"content":{},"origin_server_ts":%d,"depth":%d,"hashes":{"sha256":"x"},`+
		`"prev_events":[%q],"room_id":"!room:example.org","sender":"@alice:example.org","signatures":{},`+
		`"type":"m.room.message"}`, len(g.events), depth, prev))
	if g.events == nil {
		g.events = map[string]*types.HeaderedEvent{}
	}
	g.events[e.EventID()] = e
	return e.EventID()
}

// set sets the membership of Alice, and the power level that messages need. She has none.
func (g *graph) set(t *testing.T, membership string, needed int) {
	t.Helper()
	g.exists, g.joined, g.state = true, membership == spec.Join, nil
	for _, s := range [][3]string{
		{spec.MRoomCreate, "", `{"creator":"@bob:example.org","room_version":"10"}`},
		{spec.MRoomMember, "@alice:example.org", `{"membership":"` + membership + `"}`},
		{spec.MRoomPowerLevels, "", fmt.Sprintf(`{"events_default":%[1]d,"state_default":%[1]d}`, needed)},
	} {
		g.state = append(g.state, stateOf(t, s[0], s[1], s[2]))
	}
}

// stateOf returns a state event of Bob's, who created the room.
func stateOf(t *testing.T, eventType, key, content string) *types.HeaderedEvent {
	t.Helper()
	return pduOf(t, fmt.Sprintf(`{"auth_events":[],"content":%s,"origin_server_ts":1,"depth":1,"hashes":{"sha256":"x"},"prev_events":[],`+
		`"room_id":"!room:example.org","sender":"@bob:example.org","signatures":{},"state_key":%q,"type":%q}`, content, key, eventType))
}

func pduOf(t *testing.T, json string) *types.HeaderedEvent {
	t.Helper()
	version, err := gomatrixserverlib.GetRoomVersion(gomatrixserverlib.RoomVersionV10)
	require.NoError(t, err)
	pdu, err := version.NewEventFromTrustedJSON([]byte(json), false)
	require.NoError(t, err)
	return &types.HeaderedEvent{PDU: pdu}
}

func tupleOf(e *types.HeaderedEvent) gomatrixserverlib.StateKeyTuple {
	return gomatrixserverlib.StateKeyTuple{EventType: e.Type(), StateKey: *e.StateKey()}
}
