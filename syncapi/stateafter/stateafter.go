// Package stateafter answers syncs with the state at the end of the timeline (MSC4222).
package stateafter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/gorilla/mux"
	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/matrix-org/dendrite/internal/sqlutil"
	rstypes "github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/dendrite/syncapi/synctypes"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/around"
)

// Route answers /sync as Dendrite does, but clients that ask for it get the state at the end of each timeline instead of the state at its
// beginning.
//
// Dendrite makes the answer. Then Route replaces the state in it, from Dendrite's own record of the roomserver's resolved state, see
// [record]. After a chain of syncs, a client has exactly the state that the room had at the last next_batch, even if the state has changed
// since:
//
//   - State that was set by state resolution and is in no timeline is included, even if Dendrite's answer does not have the room.
//   - State that was set after next_batch is not included. The exception is a room whose state has been rewritten since: the answer has
//     its current state, and so has the next sync.
//   - State that vanished without a replacement is not reported, because MSC4222 cannot express it.
//   - State that changes by resolution together with a redaction is not reported, because Dendrite's syncapi does not notice it.
type Route struct{ record *record }

// The stable and unstable names of the parameter and of the field.
const (
	parameter         = "use_state_after"
	unstableParameter = "org.matrix.msc4222.use_state_after"
	field             = "state_after"
	unstableField     = "org.matrix.msc4222.state_after"
)

// New returns the route. It opens the syncapi's database.
func New(
	ctx context.Context, cm *sqlutil.Connections, options *config.DatabaseOptions, rsAPI roomserverAPI,
) (*Route, error) {
	record, err := openRecord(ctx, cm, options, rsAPI)
	if err != nil {
		return nil, err
	}
	return &Route{record: record}, nil
}

// Middleware returns a middleware for the router of the client API. It changes the answers of /sync to requests with the parameter.
func (s *Route) Middleware(userAPI userapi.QueryAcccessTokenAPI) mux.MiddlewareFunc {
	return around.Get(asksForStateAfter, func(dendrite http.Handler) http.Handler {
		return httputil.MakeAuthAPI("sync_state_after", userAPI, func(req *http.Request, device *userapi.Device) util.JSONResponse {
			return s.sync(dendrite, req, device)
		}, httputil.WithAllowGuests())
	})
}

// asksForStateAfter reports whether a request is a sync with the parameter.
func asksForStateAfter(req *http.Request) bool {
	version, isSync := strings.CutSuffix(strings.TrimPrefix(req.URL.Path, httputil.PublicClientPathPrefix), "/sync")
	return isSync && (version == "v3" || version == "r0") &&
		strings.Contains(req.URL.RawQuery, parameter) && fieldFor(req.URL.Query()) != ""
}

// fieldFor returns the name of the field that a request asks for, or "".
func fieldFor(query url.Values) string {
	switch {
	case query.Get(parameter) == "true":
		return field
	case query.Get(unstableParameter) == "true":
		return unstableField
	}
	return ""
}

func (s *Route) sync(dendrite http.Handler, req *http.Request, device *userapi.Device) util.JSONResponse {
	answer, body, ok := around.Answer(dendrite, req)
	if !ok {
		return answer
	}
	query := req.URL.Query()
	result, err := s.replace(req.Context(), body, query, device, fieldFor(query))
	if err != nil {
		if !errors.Is(err, context.Canceled) {
			util.GetLogger(req.Context()).WithError(err).Error("Failed to find the state after a sync")
		}
		return util.JSONResponse{Code: http.StatusInternalServerError, JSON: spec.InternalServerError{}}
	}
	return util.JSONResponse{Code: http.StatusOK, JSON: result}
}

// object is a JSON object with only some keys decoded.
type object = map[string]json.RawMessage

// replace replaces the state of all rooms in an answer by the field with this name, and adds rooms of which only the state has changed.
func (s *Route) replace(
	ctx context.Context, body []byte, query url.Values, device *userapi.Device, name string,
) (object, error) {
	q, err := s.question(ctx, query, gjson.GetBytes(body, "next_batch").Str, device)
	if err != nil {
		return nil, err
	}
	var (
		answer, rooms object
		join, leave   map[string]object
	)
	err = json.Unmarshal(body, &answer)
	for path, into := range map[string]any{"rooms": &rooms, "rooms.join": &join, "rooms.leave": &leave} {
		if part := gjson.GetBytes(body, path).Raw; part != "" {
			err = errors.Join(err, json.Unmarshal([]byte(part), into))
		}
	}
	if err != nil {
		return nil, fmt.Errorf("reading an answer: %w", err)
	}
	if err = q.look(ctx, slices.AppendSeq(slices.Collect(maps.Keys(join)), maps.Keys(leave))); err != nil {
		return nil, err
	}
	put := func(room object, events []*rstypes.HeaderedEvent, err error, more ...synctypes.ClientEvent) error {
		if err != nil {
			return err
		}
		delete(room, "state")
		room[name], err = json.Marshal(struct {
			Events []synctypes.ClientEvent `json:"events"`
		}{append(q.clientEvents(ctx, events), more...)})
		return err
	}
	for roomID, room := range join {
		events, err := q.joined(ctx, roomID, membersIn(room))
		if err = put(room, events, err); err != nil {
			return nil, err
		}
	}
	for roomID, room := range leave {
		events, err := q.left(ctx, roomID, membersIn(room))
		if err = put(room, events, err, q.retired(ctx, roomID, room, events)...); err != nil {
			return nil, err
		}
	}
	for _, roomID := range q.unmentioned {
		events, err := q.silent(ctx, roomID)
		if err == nil && len(events) == 0 {
			continue
		}
		if join == nil {
			join = map[string]object{}
		}
		join[roomID] = object{}
		if err = put(join[roomID], events, err); err != nil {
			return nil, err
		}
	}
	return answer, assemble(answer, rooms, join, leave)
}

// assemble puts the changed rooms back into an answer.
func assemble(answer, rooms object, join, leave map[string]object) (err error) {
	if len(join) == 0 && len(leave) == 0 {
		return nil
	}
	if rooms == nil {
		rooms = object{}
	}
	for key, part := range map[string]map[string]object{"join": join, "leave": leave} {
		if len(part) > 0 {
			if rooms[key], err = json.Marshal(part); err != nil {
				return err
			}
		}
	}
	answer["rooms"], err = json.Marshal(rooms)
	return err
}

// members are the users whose memberships a client may need to show a room of an answer.
type members struct {
	// senders sent the events of the timeline.
	senders []string
	// others have a member event in the timeline, or are needed for the room's name.
	others []string
	// loaded have a member event in the state that Dendrite answered, because the client may not have it yet.
	loaded []string
}

func membersIn(room object) (m members) {
	for _, event := range gjson.GetBytes(room["timeline"], "events").Array() {
		m.senders = append(m.senders, event.Get("sender").Str)
		if key := event.Get("state_key"); key.Exists() && event.Get("type").Str == spec.MRoomMember {
			m.others = append(m.others, key.Str)
		}
	}
	for _, hero := range gjson.GetBytes(room["summary"], `m\.heroes`).Array() {
		m.others = append(m.others, hero.Str)
	}
	for _, event := range gjson.GetBytes(room["state"], "events").Array() {
		if event.Get("type").Str == spec.MRoomMember {
			m.loaded = append(m.loaded, event.Get("state_key").Str)
		}
	}
	return m
}
