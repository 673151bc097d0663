// Package summary describes rooms to users who may want to join them or knock at them (MSC3266).
package summary

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/gorilla/mux"
	"github.com/matrix-org/dendrite/clientapi/auth"
	fsapi "github.com/matrix-org/dendrite/federationapi/api"
	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/dendrite/setup/config"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/fclient"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/limits"
)

// Summaries answers requests for summaries of rooms. A room that this server is not in is looked up on other servers. A room that the
// requester may not see is answered as a room that does not exist: with the same text, after the same work, and after the same time.
type Summaries struct {
	dendrite  *config.ClientAPI
	rsAPI     RoomserverAPI
	cfg       Config
	places    *limits.Places
	users     *limits.Limiter[string]
	addresses *limits.Limiter[netip.Prefix]
}

// Config configures the routes.
type Config struct {
	// Limit limits the requests of each user, and those without a login from each address. The zero value allows everything.
	Limit limits.Rate
	// RealIPHeader is the header in which a trusted reverse proxy names the client's address, or "" if there is none.
	RealIPHeader string
}

// RoomserverAPI is the part of the roomserver that summaries use.
type RoomserverAPI interface {
	api.QueryEventsAPI
	api.QuerySenderIDAPI
	api.QueryBulkStateContentAPI
	GetRoomIDForAlias(ctx context.Context, req *api.GetRoomIDForAliasRequest, res *api.GetRoomIDForAliasResponse) error
	QueryServerJoinedToRoom(ctx context.Context, req *api.QueryServerJoinedToRoomRequest, res *api.QueryServerJoinedToRoomResponse) error
	QueryRoomsForUser(ctx context.Context, userID spec.UserID, membership string) ([]spec.RoomID, error)
	JoinedUserCount(ctx context.Context, roomID string) (int, error)
	Federation() fsapi.RoomserverFederationAPI
}

const (
	// maxVias is how many other servers are asked about one room at most, one after the other.
	maxVias = 5
	// viasTimeout is how long these servers may take in total.
	viasTimeout = 20 * time.Second
	// notFoundStep is the unit to which the time until an answer of "not found" is rounded up. The exact time would tell how much state the
	// database read, and so whether there is a room.
	notFoundStep = 50 * time.Millisecond
)

// New returns the routes, which AddRoutes registers.
func New(cfg Config, dendrite *config.ClientAPI, rsAPI RoomserverAPI) *Summaries {
	return &Summaries{
		dendrite: dendrite, rsAPI: rsAPI, cfg: cfg, places: limits.NewPlaces(),
		users: limits.New[string](cfg.Limit), addresses: limits.New[netip.Prefix](cfg.Limit),
	}
}

// summary is the answer to a request.
type summary struct {
	RoomID         string   `json:"room_id"`
	Name           string   `json:"name,omitempty"`
	Topic          string   `json:"topic,omitempty"`
	AvatarURL      string   `json:"avatar_url,omitempty"`
	CanonicalAlias string   `json:"canonical_alias,omitempty"`
	JoinedMembers  int      `json:"num_joined_members"`
	GuestCanJoin   bool     `json:"guest_can_join"`
	WorldReadable  bool     `json:"world_readable"`
	JoinRule       string   `json:"join_rule,omitempty"`
	AllowedRoomIDs []string `json:"allowed_room_ids,omitempty"`
	RoomType       string   `json:"room_type,omitempty"`
	Encryption     string   `json:"encryption,omitempty"`
	RoomVersion    string   `json:"room_version,omitempty"`
	Membership     string   `json:"membership,omitempty"`
}

// unstableSummary repeats some fields under their unstable names, for clients that know only those.
type unstableSummary struct {
	*summary
	UnstableEncryption  string `json:"im.nheko.summary.encryption,omitempty"`
	UnstableRoomVersion string `json:"im.nheko.summary.room_version,omitempty"`
}

// AddRoutes registers the routes.
func (s *Summaries) AddRoutes(router *mux.Router, userAPI userapi.QueryAcccessTokenAPI) {
	handle := func(path string, form func(*summary) any) {
		router.Handle(path, httputil.MakeExternalAPI("room_summary", func(req *http.Request) util.JSONResponse {
			room, failed := s.answer(req, userAPI)
			if failed != nil {
				return *failed
			}
			return util.JSONResponse{Code: http.StatusOK, JSON: form(room)}
		})).Methods(http.MethodGet, http.MethodOptions)
	}
	unstable := func(room *summary) any { return unstableSummary{room, room.Encryption, room.RoomVersion} }
	handle("/v1/room_summary/{roomIDOrAlias}", func(room *summary) any { return room })
	handle("/unstable/im.nheko.summary/summary/{roomIDOrAlias}", unstable)
	handle("/unstable/im.nheko.summary/rooms/{roomIDOrAlias}/summary", unstable)
}

func (s *Summaries) answer(req *http.Request, userAPI userapi.QueryAcccessTokenAPI) (*summary, *util.JSONResponse) {
	var device *userapi.Device
	if req.Header.Get("Authorization") != "" || req.URL.Query().Has("access_token") {
		var failed *util.JSONResponse
		if device, failed = auth.VerifyUserFromRequest(req, userAPI); failed != nil {
			return nil, failed
		}
		leave, err := s.places.Enter(req.Context(), device)
		if errors.Is(err, limits.ErrCrowded) {
			crowded := limits.Exceeded("Too many requests", time.Second)
			return nil, &crowded
		}
		if err != nil {
			return nil, &util.JSONResponse{Code: http.StatusInternalServerError, JSON: spec.InternalServerError{}} // the client hung up
		}
		defer leave()
	}
	asked := time.Now()
	if wait := s.wait(req, device, asked); wait > 0 {
		limited := limits.Exceeded("Too many requests", wait)
		return nil, &limited
	}
	vars, err := httputil.URLDecodeMapValues(mux.Vars(req))
	if err != nil {
		return nil, &util.JSONResponse{Code: http.StatusBadRequest, JSON: spec.InvalidParam(err.Error())}
	}
	a, err := asker(device)
	var room *summary
	if err == nil {
		room, err = s.find(req.Context(), a, vars["roomIDOrAlias"], req.URL.Query()["via"])
	}
	switch {
	case err != nil:
		util.GetLogger(req.Context()).WithError(err).Error("Failed to summarise a room")
		return nil, &util.JSONResponse{Code: http.StatusInternalServerError, JSON: spec.InternalServerError{}}
	case room == nil:
		onGrid(req.Context(), asked)
		return nil, &util.JSONResponse{Code: http.StatusNotFound, JSON: spec.NotFound("there is no such room, or you may not know of it")}
	}
	return room, nil
}

// wait returns 0 if a request is allowed now, or else the time until it is. Requests with a login count by user, and all others by network.
// Users who are exempt from Dendrite's limits are exempt here too.
func (s *Summaries) wait(req *http.Request, device *userapi.Device, now time.Time) time.Duration {
	switch {
	case device == nil:
		return s.addresses.Wait(limits.ClientNetwork(req, s.cfg.RealIPHeader), now)
	case device.AccountType == userapi.AccountTypeAdmin, device.AccountType == userapi.AccountTypeAppService,
		slices.Contains(s.dendrite.RateLimiting.ExemptUserIDs, device.UserID):
		return 0
	}
	return s.users.Wait(device.UserID, now)
}

// onGrid waits until a whole number of steps, notFoundStep each, has passed since a time.
func onGrid(ctx context.Context, since time.Time) {
	select {
	case <-ctx.Done():
	case <-time.After(notFoundStep - time.Since(since)%notFoundStep):
	}
}

// whoAsks is the requester. It is nil for a request without a login.
type whoAsks struct {
	userID spec.UserID
	guest  bool
}

func asker(device *userapi.Device) (*whoAsks, error) {
	if device == nil {
		return nil, nil
	}
	userID, err := spec.NewUserID(device.UserID, true)
	if err != nil {
		return nil, err
	}
	return &whoAsks{userID: *userID, guest: device.AccountType == userapi.AccountTypeGuest}, nil
}

// find returns the summary of a room, or nil if there is none that the requester may see. Only a user who is logged in, and is no guest,
// can make this server contact other servers.
func (s *Summaries) find(ctx context.Context, who *whoAsks, roomIDOrAlias string, vias []string) (*summary, error) {
	remotely := who != nil && !who.guest
	roomID := roomIDOrAlias
	if strings.HasPrefix(roomIDOrAlias, "#") {
		var servers []spec.ServerName
		var err error
		if roomID, servers, err = s.resolve(ctx, roomIDOrAlias, remotely); err != nil {
			return nil, err
		}
		for _, server := range servers {
			vias = append(vias, string(server))
		}
	}
	id, err := spec.NewRoomID(roomID)
	if err != nil {
		return nil, nil
	}
	room, err := s.local(ctx, who, *id)
	if err != nil || room != nil || !remotely {
		return room, err
	}
	// The other servers are asked even if this server is in the room. Otherwise a server in vias would learn from not being asked that this
	// server knows the room.
	return s.remote(ctx, who, roomID, vias)
}

// resolve returns the room of an alias, or "". If another server had to be asked, it also returns servers that are in the room.
func (s *Summaries) resolve(ctx context.Context, alias string, remotely bool) (roomID string, servers []spec.ServerName, err error) {
	_, domain, err := gomatrixserverlib.SplitID('#', alias)
	if err != nil {
		return "", nil, nil
	}
	var known api.GetRoomIDForAliasResponse
	err = s.rsAPI.GetRoomIDForAlias(ctx, &api.GetRoomIDForAliasRequest{Alias: alias, IncludeAppservices: true}, &known)
	if err != nil || known.RoomID != "" || s.dendrite.Matrix.IsLocalServerName(domain) || !remotely {
		return known.RoomID, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, viasTimeout)
	defer cancel()
	var found fsapi.PerformDirectoryLookupResponse
	err = s.rsAPI.Federation().PerformDirectoryLookup(ctx, &fsapi.PerformDirectoryLookupRequest{RoomAlias: alias, ServerName: domain}, &found)
	if err != nil {
		util.GetLogger(ctx).WithError(err).Debug("Nobody knows this alias")
		return "", nil, nil
	}
	return found.RoomID, append(found.ServerNames, domain), nil
}

// local summarises a room that this server is in. It returns nil if this server is not in the room, or the requester may not know of it.
func (s *Summaries) local(ctx context.Context, who *whoAsks, id spec.RoomID) (*summary, error) {
	roomID := id.String()
	a, err := s.access(ctx, who, id)
	if err != nil || !a.allows() {
		return nil, err
	}
	state, err := s.state(ctx, roomID, spec.MRoomCreate, spec.MRoomName, spec.MRoomTopic, spec.MRoomAvatar,
		spec.MRoomCanonicalAlias, spec.MRoomGuestAccess, spec.MRoomHistoryVisibility, spec.MRoomJoinRules, spec.MRoomEncryption)
	if err != nil {
		return nil, err
	}
	content := func(eventType, path string) string {
		if event := state[eventType]; event != nil {
			return gjson.GetBytes(event.Content(), path).Str
		}
		return ""
	}
	create := state[spec.MRoomCreate]
	if create == nil {
		return nil, nil
	}
	room := &summary{
		RoomID:         roomID,
		Name:           content(spec.MRoomName, "name"),
		Topic:          content(spec.MRoomTopic, "topic"),
		AvatarURL:      content(spec.MRoomAvatar, "url"),
		CanonicalAlias: content(spec.MRoomCanonicalAlias, "alias"),
		GuestCanJoin:   content(spec.MRoomGuestAccess, "guest_access") == "can_join",
		WorldReadable:  content(spec.MRoomHistoryVisibility, "history_visibility") == string(gomatrixserverlib.HistoryVisibilityWorldReadable),
		JoinRule:       a.joinRule,
		RoomType:       content(spec.MRoomCreate, "type"),
		Encryption:     content(spec.MRoomEncryption, "algorithm"),
		RoomVersion:    string(create.Version()),
	}
	if isRestricted(room.JoinRule) {
		room.AllowedRoomIDs = allowedRooms(state[spec.MRoomJoinRules])
	}
	if who != nil {
		room.Membership = a.membership
	}
	room.JoinedMembers, err = s.rsAPI.JoinedUserCount(ctx, roomID)
	return room, err
}

// remote asks other servers for the summary of a room.
func (s *Summaries) remote(ctx context.Context, who *whoAsks, roomID string, vias []string) (*summary, error) {
	invited, err := s.rsAPI.QueryRoomsForUser(ctx, who.userID, spec.Invite)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, viasTimeout)
	defer cancel()
	asked := map[spec.ServerName]bool{}
	for _, via := range vias {
		server := spec.ServerName(via)
		if _, _, ok := spec.ParseAndValidateServerName(server); !ok || asked[server] || s.dendrite.Matrix.IsLocalServerName(server) {
			continue
		}
		if len(asked) == maxVias {
			break
		}
		asked[server] = true
		answer, err := s.rsAPI.Federation().RoomHierarchies(ctx, s.dendrite.Matrix.ServerName, server, roomID, true)
		if err != nil || answer.Room.RoomID != roomID {
			util.GetLogger(ctx).WithError(err).WithField("server", server).Debug("No summary of a room")
			continue
		}
		room := fromHierarchy(&answer.Room)
		room.Membership = spec.Leave
		if slices.ContainsFunc(invited, func(id spec.RoomID) bool { return id.String() == roomID }) {
			room.Membership = spec.Invite
		}
		// The answer does not have the room's version, so the join rule is taken as the other server reports it.
		a := access{known: true, who: who, membership: room.Membership, joinRule: room.JoinRule, worldReadable: room.WorldReadable,
			allowedRooms: room.AllowedRoomIDs}
		if isRestricted(room.JoinRule) {
			if a.joinedRooms, err = s.rsAPI.QueryRoomsForUser(ctx, who.userID, spec.Join); err != nil {
				return nil, err
			}
		}
		if !a.allows() {
			return nil, nil
		}
		return room, nil
	}
	return nil, nil
}

func fromHierarchy(room *fclient.RoomHierarchyRoom) *summary {
	return &summary{
		RoomID: room.RoomID, Name: room.Name, Topic: room.Topic, AvatarURL: room.AvatarURL, CanonicalAlias: room.CanonicalAlias,
		JoinedMembers: room.JoinedMembersCount, GuestCanJoin: room.GuestCanJoin, WorldReadable: room.WorldReadable,
		JoinRule: room.JoinRule, AllowedRoomIDs: room.AllowedRoomIDs, RoomType: room.RoomType,
	}
}

// state returns a room's state events of these types with an empty state key.
func (s *Summaries) state(ctx context.Context, roomID string, eventTypes ...string) (map[string]*types.HeaderedEvent, error) {
	req, res := api.QueryCurrentStateRequest{RoomID: roomID}, api.QueryCurrentStateResponse{}
	for _, eventType := range eventTypes {
		req.StateTuples = append(req.StateTuples, gomatrixserverlib.StateKeyTuple{EventType: eventType})
	}
	err := s.rsAPI.QueryCurrentState(ctx, &req, &res)
	state := map[string]*types.HeaderedEvent{}
	for tuple, event := range res.StateEvents {
		state[tuple.EventType] = event
	}
	return state, err
}
