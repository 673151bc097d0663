package clientapi

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/matrix-org/dendrite/clientapi/routing"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/dendrite/setup/config"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/fclient"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"
	"github.com/sirupsen/logrus"
)

// rehearsal is a made-up room in which the sender of an event may do everything. It finds events that can never be sent, before they are
// scheduled: an event that Dendrite's SendEvent refuses in this room is refused in every room of this version. The room uses no
// database, so a failure is the event's fault.
type rehearsal struct {
	api.ClientRoomserverAPI // nil: SendEvent asks nothing else
	version                 gomatrixserverlib.IRoomVersion
	keyID                   gomatrixserverlib.KeyID
	user                    *spec.UserID
	content                 []byte
	member                  gomatrixserverlib.MemberContent // the content of an m.room.member event, else empty

	// built is the event that SendEvent would have sent, or nil if it refused.
	built gomatrixserverlib.PDU
}

const (
	// rehearsalRoom is the local part of the ID of the made-up room. The real room's ID would not do: SendEvent locks the pair of room
	// and user, so the rehearsal would wait for a send to the real room that hangs.
	rehearsalRoom = "!rehearsal"
	// someKey and otherKey stand for the keys of users in a room with pseudo IDs.
	someKey  = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
	otherKey = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE"
)

var (
	// rehearsalKey signs rehearsed events, which never leave this process.
	rehearsalKey = ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	// silence is the log of rehearsals, and discards everything. SendEvent would log that it sent an event, or failed to.
	silence = sync.OnceValue(func() *logrus.Entry {
		logger := logrus.New()
		logger.SetOutput(io.Discard)
		logger.SetLevel(logrus.PanicLevel)
		return logrus.NewEntry(logger)
	})
)

// rehearse calls SendEvent with an event for the made-up room. It returns the event that SendEvent built, and SendEvent's answer. If
// SendEvent built none, built is nil and the answer says why. A panic becomes an answer of 500.
func rehearse(
	ctx context.Context, cfg *config.ClientAPI, device *userapi.Device, version gomatrixserverlib.IRoomVersion,
	to target, content []byte, timestamp time.Time,
) (res util.JSONResponse, built gomatrixserverlib.PDU) {
	user, err := spec.NewUserID(device.UserID, true)
	if err != nil {
		return util.JSONResponse{Code: http.StatusBadRequest, JSON: spec.BadJSON("Bad userID")}, nil
	}
	r := &rehearsal{version: version, keyID: "ed25519:1", user: user, content: content}
	if cfg.Matrix != nil && version.Version() != gomatrixserverlib.RoomVersionPseudoIDs {
		r.keyID = cfg.Matrix.KeyID
	}
	if to.eventType == spec.MRoomMember {
		_ = json.Unmarshal(content, &r.member)
	}
	defer func() {
		if panicked := recover(); panicked != nil {
			res, built = util.JSONResponse{Code: http.StatusInternalServerError, JSON: spec.Unknown(fmt.Sprint(panicked))}, nil
		}
	}()
	path := "/"
	if !timestamp.IsZero() {
		path += "?" + url.Values{"ts": {strconv.FormatInt(timestamp.UnixMilli(), 10)}}.Encode()
	}
	ctx = util.ContextWithLogger(ctx, silence())
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, path, bytes.NewReader(content))
	if err != nil {
		return util.JSONResponse{Code: http.StatusInternalServerError, JSON: spec.Unknown(err.Error())}, nil
	}
	sender := *device // a copy, because the caller goes on to use the original
	res = routing.SendEvent(req, &sender, r.roomID(), to.eventType, nil, to.stateKey, cfg, r, nil)
	return res, r.built
}

func (r *rehearsal) roomID() string { return rehearsalRoom + ":" + string(r.user.Domain()) }

func (r *rehearsal) pseudoIDs() bool {
	return r.version.Version() == gomatrixserverlib.RoomVersionPseudoIDs
}

// senderID returns the sender ID of the event's sender in the room.
func (r *rehearsal) senderID() spec.SenderID {
	if r.pseudoIDs() {
		return someKey
	}
	return spec.SenderID(r.user.String())
}

func (r *rehearsal) QueryRoomVersionForRoom(context.Context, string) (gomatrixserverlib.RoomVersion, error) {
	return r.version.Version(), nil
}

// QuerySenderIDForUser implements api.QuerySenderIDAPI. The room knows every user.
func (r *rehearsal) QuerySenderIDForUser(_ context.Context, _ spec.RoomID, user spec.UserID) (*spec.SenderID, error) {
	id := spec.SenderID(user.String())
	switch {
	case !r.pseudoIDs():
	case user.String() == r.user.String():
		id = someKey
	default:
		id = otherKey
	}
	return &id, nil
}

func (r *rehearsal) QueryUserIDForSender(_ context.Context, _ spec.RoomID, id spec.SenderID) (*spec.UserID, error) {
	if r.pseudoIDs() && !id.IsUserID() {
		return r.user, nil
	}
	return spec.NewUserID(string(id), true)
}

func (r *rehearsal) SigningIdentityFor(context.Context, spec.RoomID, spec.UserID) (fclient.SigningIdentity, error) {
	name := r.user.Domain()
	if r.pseudoIDs() {
		name = someKey
	}
	return fclient.SigningIdentity{PrivateKey: rehearsalKey, KeyID: r.keyID, ServerName: name}, nil
}

// QueryCurrentState implements api.QueryEventsAPI. It finds no state, so SendEvent never takes the event for a repetition.
func (r *rehearsal) QueryCurrentState(context.Context, *api.QueryCurrentStateRequest, *api.QueryCurrentStateResponse) error {
	return nil
}

// GetAliasesForRoomID implements api.ClientRoomserverAPI. The room has all aliases that the content names.
func (r *rehearsal) GetAliasesForRoomID(
	_ context.Context, _ *api.GetAliasesForRoomIDRequest, res *api.GetAliasesForRoomIDResponse,
) error {
	var named api.AliasEvent
	err := json.Unmarshal(r.content, &named)
	res.Aliases = append(named.AltAliases, named.Alias)
	return err
}

func (r *rehearsal) QueryLatestEventsAndState(
	_ context.Context, req *api.QueryLatestEventsAndStateRequest, res *api.QueryLatestEventsAndStateResponse,
) error {
	res.RoomExists, res.RoomVersion, res.Depth = true, r.version.Version(), 1
	res.LatestEvents = []string{}
	for _, tuple := range req.StateToFetch {
		content, ok := r.state(tuple)
		if !ok {
			continue
		}
		e, err := r.event(tuple, content)
		if err != nil {
			return err
		}
		res.StateEvents = append(res.StateEvents, &types.HeaderedEvent{PDU: e})
	}
	return nil
}

// state returns the content of a piece of the room's state, which allows the sender to do everything.
func (r *rehearsal) state(tuple gomatrixserverlib.StateKeyTuple) (content any, ok bool) {
	switch tuple.EventType {
	case spec.MRoomCreate: // without power levels, its sender has the highest
		return map[string]any{"creator": r.senderID(), "room_version": r.version.Version()}, true
	case spec.MRoomJoinRules:
		rule := spec.Public
		if r.member.Membership == spec.Knock {
			rule = spec.Knock
		}
		return map[string]any{"join_rule": rule}, true
	case spec.MRoomMember:
		if tuple.StateKey != string(r.senderID()) {
			return nil, false // other users are not in the room, so the sender may invite, kick or ban them
		}
		membership := spec.Join
		if r.member.Membership == spec.Knock {
			membership = spec.Leave
		}
		return map[string]any{"membership": membership}, true
	}
	return nil, false
}

func (r *rehearsal) event(tuple gomatrixserverlib.StateKeyTuple, content any) (gomatrixserverlib.PDU, error) {
	data, err := json.Marshal(map[string]any{
		"type": tuple.EventType, "state_key": tuple.StateKey, "content": content, "sender": r.senderID(),
		"room_id": r.roomID(), "event_id": "$" + strings.ToLower(tuple.EventType) + ":" + string(r.user.Domain()),
		"depth": 1, "origin_server_ts": 1, "prev_events": []string{}, "auth_events": []string{}, "hashes": map[string]string{},
	})
	if err != nil {
		return nil, err
	}
	return r.version.NewEventFromTrustedJSON(data, false)
}

// InputRoomEvents implements api.InputRoomEventsAPI. It keeps the event and returns an error, so that SendEvent goes no further.
func (r *rehearsal) InputRoomEvents(_ context.Context, req *api.InputRoomEventsRequest, res *api.InputRoomEventsResponse) {
	if len(req.InputRoomEvents) == 1 {
		r.built = req.InputRoomEvents[0].Event.PDU
	}
	res.ErrMsg = "rehearsed"
}
