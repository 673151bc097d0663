package clientapi

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/gorilla/mux"
	clientutil "github.com/matrix-org/dendrite/clientapi/httputil"
	"github.com/matrix-org/dendrite/internal/httputil"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/dendritefix"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
)

const (
	// delayKey is the query parameter that makes a send a delayed one (unstable). delayField is the field in the body of the dedicated
	// endpoint.
	delayKey   = "org.matrix.msc4140.delay"
	delayField = "delay_ms"
	// maxContentSize is the largest content of a delayed event, in bytes. It is the size limit of a whole event.
	maxContentSize = 64 << 10
	// maxScheduleSize is the limit for the body of a request that schedules, in bytes. It is larger than maxContentSize, because the
	// request may have spaces and escapes that the event will not have.
	maxScheduleSize = 4 * maxContentSize
	// scheduleReadTimeout is how long the body of a request that schedules may take to arrive.
	scheduleReadTimeout = 30 * time.Second
)

// stickyKeys are the query parameters, stable and unstable, that make an event sticky (MSC4354). Sticky events are not supported. Such a
// request is refused: sent without stickiness, the event would mean something else.
var stickyKeys = []string{"sticky_duration_ms", "org.matrix.msc4354.sticky_duration_ms"}

// Scheduler schedules delayed events.
type Scheduler interface {
	Scheduled(ctx context.Context, request expiration.RequestHash) (delayID string, err error)
	Schedule(
		ctx context.Context, e expiration.Event, d expiration.Delayed, delay time.Duration, service bool,
	) (delayID string, err error)
}

// dialect selects the field names and answers of either the stable or the unstable paths. They differ where the merged text of MSC4140
// and today's clients disagree.
type dialect bool

const (
	stable   dialect = true
	unstable dialect = false
)

// isDelayed reports whether a send has a delay in its query, which is well-formed (see webapi.Authenticated).
func isDelayed(req *http.Request) bool { return req.URL.Query().Has(delayKey) }

// scheduleByQuery answers a send with a delay in its query.
func (a *API) scheduleByQuery(req *http.Request, device *userapi.Device, to target) util.JSONResponse {
	// Several delays are as bad as one that is no number.
	delay, err := a.parseDelay(delayKey, strings.Join(req.URL.Query()[delayKey], ","), queryForm)
	if err != nil {
		return errorResponse(req, err)
	}
	content, err := webapi.ReadBody(http.MaxBytesReader(nil, req.Body, maxScheduleSize))
	if err != nil {
		return errorResponse(req, err)
	}
	return a.schedule(req, device, to, content, delay)
}

// scheduleByField answers the dedicated endpoint, whose requests have delay, content and state key in their body.
func (a *API) scheduleByField(req *http.Request, device *userapi.Device, to target, f form) util.JSONResponse {
	body, err := webapi.ReadBody(req.Body)
	if err != nil {
		return errorResponse(req, err)
	}
	if err = webapi.CheckObject(body, "The body"); err != nil {
		return errorResponse(req, err)
	}
	var fields map[string]json.RawMessage
	if err = json.Unmarshal(body, &fields); err != nil {
		return errorResponse(req, webapi.BadRequest(spec.BadJSON("The body must be a JSON object")))
	}
	for _, required := range []string{delayField, "content"} {
		if _, ok := fields[required]; !ok {
			return errorResponse(req, webapi.BadRequest(spec.MissingParam(required+" is missing")))
		}
	}
	delay, err := a.parseDelay(delayField, string(fields[delayField]), f)
	if err != nil {
		return errorResponse(req, err)
	}
	if stateKey, ok := fields["state_key"]; ok {
		var key *string
		if json.Unmarshal(stateKey, &key) != nil || key == nil {
			return errorResponse(req, webapi.BadRequest(spec.BadJSON("state_key must be a string")))
		}
		to.stateKey = key
	}
	return a.schedule(req, device, to, fields["content"], delay)
}

// schedule schedules an event. The sender must be in the room, with the power to send the event now. Whether the room allows the event is
// checked when it is due.
func (a *API) schedule(
	req *http.Request, device *userapi.Device, to target, content []byte, delay time.Duration,
) util.JSONResponse {
	if err := checkNames(to); err != nil {
		return errorResponse(req, err)
	}
	leave, err := a.enter(req, device, a.users)
	if err != nil {
		return errorResponse(req, err)
	}
	defer leave()
	var request *expiration.Request
	if to.txnID != nil {
		to.delayed = true
		request = &expiration.Request{Hash: *requestHash(device, to)}
		// A repeated request gets the first answer, whatever its content is.
		switch delayID, err := a.timers.Scheduled(req.Context(), request.Hash); {
		case err != nil:
			return errorResponse(req, err)
		case delayID != "":
			return scheduled(delayID)
		}
	}
	d, sent, err := a.parseDelayed(req, device, content)
	if err == nil && a.cfg.MaxScheduled == 0 {
		err = webapi.Refuse(http.StatusForbidden, spec.Forbidden("Delayed events are switched off"))
	}
	if err == nil {
		err = a.checkJoined(req, device, to.roomID)
	}
	if err == nil {
		err = a.checkPower(req.Context(), device, to)
	}
	if err == nil {
		err = a.checkScheduled(req.Context(), device, to, d, sent)
	}
	if err != nil {
		return errorResponse(req, err)
	}
	e := expiration.Event{RoomID: to.roomID, Type: to.eventType, Sender: device.UserID, Request: request}
	if to.stateKey != nil {
		key := a.stateKey(req.Context(), to).Key
		e.StateKey = &key
	}
	delayID, err := a.timers.Schedule(req.Context(), e, d, delay, device.AccountType == userapi.AccountTypeAppService)
	if err != nil {
		return errorResponse(req, err)
	}
	return scheduled(delayID)
}

func scheduled(delayID string) util.JSONResponse {
	return util.JSONResponse{Code: http.StatusOK, JSON: struct {
		DelayID string `json:"delay_id"`
	}{delayID}}
}

// parseDelayed checks the content of a request that schedules. It also returns the content that the event will be sent with.
func (a *API) parseDelayed(
	req *http.Request, device *userapi.Device, content []byte,
) (d expiration.Delayed, sent []byte, err error) {
	query := req.URL.Query()
	for _, key := range stickyKeys {
		if query.Has(key) {
			return d, nil, webapi.BadRequest(spec.InvalidParam(key + " is not supported"))
		}
	}
	if len(content) > maxContentSize {
		return d, nil, webapi.TooLarge("The content must be at most 65536 bytes")
	}
	if err = checkContent(content); err != nil {
		return d, nil, err
	}
	if err = webapi.CheckObject(content, "The content"); err != nil {
		return d, nil, err
	}
	d.Content = content
	if sent, d.Expires, err = parseContent(content, a.cfg.MaxDuration); err != nil {
		return d, nil, err
	}
	if query.Get("ts") != "" && device.AccountType == userapi.AccountTypeAppService { // Dendrite ignores an empty one
		d.Timestamp, err = clientutil.ParseTSParam(req)
		// Dendrite would send an event with a later time at a different time.
		if ms := d.Timestamp.UnixMilli(); err != nil || ms < 0 || ms > int64(dendritefix.MaxTimestamp) {
			return d, nil, webapi.BadRequest(spec.InvalidParam(fmt.Sprintf(
				"ts must be a whole number of milliseconds from 0 to %d", dendritefix.MaxTimestamp,
			)))
		}
	}
	return d, sent, nil
}

// checkScheduled returns an error if a delayed event can never be sent. The room must exist.
func (a *API) checkScheduled(
	ctx context.Context, device *userapi.Device, to target, d expiration.Delayed, sent []byte,
) error {
	version, err := a.rsAPI.QueryRoomVersionForRoom(ctx, to.roomID)
	if err != nil {
		return fmt.Errorf("looking up the version of a room: %w", err)
	}
	built, err := a.checkSendable(ctx, device, version, to, sent, d.Timestamp)
	if err != nil {
		return err
	}
	if to.eventType == spec.MRoomMember {
		// When it is due, an event of a user who has left is refused, and a joined user cannot knock.
		if membership, err := built.Membership(); err == nil && membership == spec.Knock {
			return webapi.Refuse(http.StatusForbidden, spec.Forbidden("A knock cannot be delayed: only members of a room can delay events"))
		}
	}
	return checkSize(built, to, d.Expires > 0)
}

// addDelayed registers the routes of delayed events. A send with a delay in its query uses the routes of ordinary sends.
func (a *API) addDelayed(router *mux.Router, userAPI userapi.QueryAcccessTokenAPI) {
	const name = "delayed_event"
	for path, f := range map[string]form{
		"/{apiversion:(?:r0|v3)}": dedicatedForm, "/unstable/org.matrix.msc4140": dedicatedUnstableForm,
	} {
		schedule := webapi.Authenticated(name, userAPI,
			func(req *http.Request, device *userapi.Device, vars map[string]string) util.JSONResponse {
				txnID := vars["txnID"]
				return a.scheduleByField(req, device, target{roomID: vars["roomID"], eventType: vars["eventType"], txnID: &txnID}, f)
			})
		router.Handle(path+"/rooms/{roomID}/delayed_event/{eventType}/{txnID}", webapi.Bounded(maxScheduleSize, scheduleReadTimeout, schedule)).
			Methods(http.MethodPut, http.MethodOptions)
	}
	router.Handle("/unstable/org.matrix.msc4140/delayed_events", hidden(webapi.Authenticated(name, userAPI,
		func(req *http.Request, device *userapi.Device, _ map[string]string) util.JSONResponse {
			return a.list(req, device)
		}))).Methods(http.MethodGet, http.MethodOptions)
	for path, d := range map[string]dialect{"/v1": stable, "/unstable/org.matrix.msc4140": unstable} {
		router.Handle(path+"/delayed_events/{delayID}", hidden(webapi.Authenticated(name, userAPI,
			func(req *http.Request, device *userapi.Device, vars map[string]string) util.JSONResponse {
				return a.look(req, device, d, vars["delayID"])
			}))).Methods(http.MethodGet, http.MethodOptions)
	}
	act := func(path string, handler http.Handler) {
		router.Handle(path, hidden(webapi.Bounded(maxKeepAliveSize, keepAliveReadTimeout, handler))).
			Methods(http.MethodPost, http.MethodOptions)
	}
	act("/v1/delayed_events/{delayID}/{action}", webapi.Authenticated(name, userAPI,
		func(req *http.Request, device *userapi.Device, vars map[string]string) util.JSONResponse {
			return a.act(req, stable, device, vars["delayID"], vars["action"])
		}))
	act("/unstable/org.matrix.msc4140/delayed_events/{delayID}/{action}",
		webapi.Untraced(name, func(req *http.Request) util.JSONResponse {
			vars, err := httputil.URLDecodeMapValues(mux.Vars(req))
			if err != nil {
				return delayedResponse(req, expiration.ErrNotFound)
			}
			return a.actUnstable(req, userAPI, vars["delayID"], vars["action"])
		}))
	act("/unstable/org.matrix.msc4140/delayed_events/{delayID}",
		webapi.Untraced(name, func(req *http.Request) util.JSONResponse {
			body, err := webapi.ReadBody(req.Body)
			if err == nil {
				err = webapi.CheckObject(body, "The body")
			}
			if err != nil {
				return errorResponse(req, err)
			}
			action := lastField(body, "action")
			if action.Type != gjson.String {
				return errorResponse(req, webapi.BadRequest(spec.MissingParam("action must be a string")))
			}
			vars, err := httputil.URLDecodeMapValues(mux.Vars(req))
			if err != nil {
				return delayedResponse(req, expiration.ErrNotFound)
			}
			if !isAction(action.Str) {
				return errorResponse(req, webapi.BadRequest(spec.InvalidParam(badAction)))
			}
			return a.actUnstable(req, userAPI, vars["delayID"], action.Str)
		}))
}
