package summary

import (
	"context"
	"slices"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/tidwall/gjson"
)

// access is what decides whether somebody may know of a room.
type access struct {
	// known is whether there is the room, as far as this server knows.
	known bool
	// who is nil for anybody. The membership is the user's, leave if it never had any.
	who        *whoAsks
	membership string
	// joinRule is what the room's rule means in its version.
	joinRule      string
	worldReadable bool
	// allowedRooms are the rooms whose members may join a restricted one, joinedRooms those that the user is in.
	allowedRooms []string
	joinedRooms  []spec.RoomID
}

// access finds out what decides. It asks for the same of a room that does not exist as of a private one.
func (s *Summaries) access(ctx context.Context, who *whoAsks, id spec.RoomID) (a access, err error) {
	roomID := id.String()
	var server api.QueryServerJoinedToRoomResponse
	err = s.rsAPI.QueryServerJoinedToRoom(ctx, &api.QueryServerJoinedToRoomRequest{RoomID: roomID}, &server)
	if err != nil {
		return access{}, err
	}
	rule, visibility := gomatrixserverlib.StateKeyTuple{EventType: spec.MRoomJoinRules},
		gomatrixserverlib.StateKeyTuple{EventType: spec.MRoomHistoryVisibility}
	tuples := []gomatrixserverlib.StateKeyTuple{rule, visibility}
	member := gomatrixserverlib.StateKeyTuple{EventType: spec.MRoomMember}
	if who != nil {
		sender, err := s.rsAPI.QuerySenderIDForUser(ctx, id, who.userID)
		if err != nil {
			return access{}, err
		}
		if sender != nil {
			member.StateKey = string(*sender)
		}
		tuples = append(tuples, member)
		if a.joinedRooms, err = s.rsAPI.QueryRoomsForUser(ctx, who.userID, spec.Join); err != nil {
			return access{}, err
		}
	}
	var state api.QueryBulkStateContentResponse
	err = s.rsAPI.QueryBulkStateContent(ctx, &api.QueryBulkStateContentRequest{RoomIDs: []string{roomID}, StateTuples: tuples}, &state)
	if err != nil {
		return access{}, err
	}
	content := state.Rooms[roomID]
	a.known, a.who = server.IsInRoom, who
	a.joinRule = meaning(content[rule], server.RoomVersion)
	a.worldReadable = content[visibility] == string(gomatrixserverlib.HistoryVisibilityWorldReadable)
	if a.membership = content[member]; a.membership == "" {
		a.membership = spec.Leave
	}
	if !a.known || a.allows() || a.joinRule != spec.Restricted || who == nil {
		return a, nil
	}
	events, err := s.state(ctx, roomID, spec.MRoomJoinRules)
	a.allowedRooms = allowedRooms(events[spec.MRoomJoinRules])
	return a, err
}

// allows reports whether who asks may know of the room: it can be read by all, joined or knocked at by all, or by who asks.
func (a *access) allows() bool {
	if !a.known {
		return false
	}
	switch a.joinRule {
	case spec.Public, spec.Knock, spec.KnockRestricted:
		return true
	}
	switch {
	case a.worldReadable:
		return true
	case a.who == nil:
		return false
	}
	switch a.membership {
	case spec.Join, spec.Invite, spec.Knock:
		return true
	case spec.Ban:
		return false
	}
	return a.joinRule == spec.Restricted && slices.ContainsFunc(a.joinedRooms, func(id spec.RoomID) bool {
		return slices.Contains(a.allowedRooms, id.String())
	})
}

// The versions in which nobody can knock, and those that have both in one rule (MSC3787); gomatrixserverlib does not tell.
var (
	withoutKnocking = []gomatrixserverlib.RoomVersion{
		gomatrixserverlib.RoomVersionV1, gomatrixserverlib.RoomVersionV2, gomatrixserverlib.RoomVersionV3,
		gomatrixserverlib.RoomVersionV4, gomatrixserverlib.RoomVersionV5, gomatrixserverlib.RoomVersionV6,
	}
	withKnockRestricted = []gomatrixserverlib.RoomVersion{
		gomatrixserverlib.RoomVersionV10, gomatrixserverlib.RoomVersionV11, gomatrixserverlib.RoomVersionPseudoIDs, "org.matrix.msc3787",
	}
)

// meaning returns what a join rule means in a room version. One that the version does not have lets nobody in who is not invited.
func meaning(joinRule string, version gomatrixserverlib.RoomVersion) string {
	has := true
	switch joinRule {
	case spec.Knock:
		has = !slices.Contains(withoutKnocking, version)
	case spec.KnockRestricted:
		has = slices.Contains(withKnockRestricted, version)
	case spec.Restricted:
		impl, err := gomatrixserverlib.GetRoomVersion(version)
		has = err == nil && impl.CheckRestrictedJoinsAllowed() == nil
	}
	if !has {
		return spec.Invite
	}
	return joinRule
}

func isRestricted(joinRule string) bool {
	return joinRule == spec.Restricted || joinRule == spec.KnockRestricted
}

// allowedRooms returns the rooms whose members may join, by an event with the join rules, or nil.
func allowedRooms(joinRules *types.HeaderedEvent) (roomIDs []string) {
	if joinRules == nil {
		return nil
	}
	for _, allow := range gjson.GetBytes(joinRules.Content(), "allow").Array() {
		if allow.Get("type").Str == spec.MRoomMembership {
			roomIDs = append(roomIDs, allow.Get("room_id").Str)
		}
	}
	return roomIDs
}
