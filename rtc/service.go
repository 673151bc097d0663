package rtc

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/gorilla/mux"
	"github.com/matrix-org/util"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/limits"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
)

// Hints are told what LiveKit reports.
type Hints interface{ Hint(e livekit.Event) }

// maxWebhook bounds the body of a webhook, in bytes. LiveKit lists the tracks of a participant in it.
const maxWebhook = 1 << 20

// service is the API of lk-jwt-service, for clients that do not ask the homeserver for tokens. Its users show who they are with OpenID tokens.
type service struct {
	*Tokens
	userAPI   UserAPI
	addresses *limits.Limiter[netip.Prefix]
	complain  *limits.Limiter[struct{}] // logs about webhooks
}

func newService(t *Tokens, userAPI UserAPI) *service {
	return &service{
		t, userAPI, limits.New[netip.Prefix](t.cfg.ServerRequests),
		limits.New[struct{}](limits.Rate{Threshold: 1, Cooloff: time.Minute}),
	}
}

// request is a kind of request to the service.
type request int

const (
	sfuGet   request = iota // a token for a device whose membership is a state event
	getToken                // a token for a member
	delegate                // no token: only the leave event is handed over
)

// addRoutes registers the routes. Without Delegations there is none for handing over alone, see Tokens.AddRoutes.
func (s *service) addRoutes(router *mux.Router) {
	path := strings.TrimPrefix(s.cfg.ServicePath, "/_matrix/client")
	add := func(name string, kind request) {
		post(router, path+name, webapi.Untraced("rtc_service", func(req *http.Request) util.JSONResponse {
			answer, err := s.answer(req, kind)
			return respond(req, answer, stopping(req.Context(), err))
		}))
	}
	add("/sfu/get", sfuGet)
	add("/get_token", getToken)
	if s.parts.Delegations != nil {
		add("/delegate_delayed_leave", delegate)
	}
	webhooks := webapi.Bounded(maxWebhook, bodyTimeout, webapi.Untraced("rtc_webhook", s.webhook))
	router.Handle(path+"/sfu_webhook", webhooks).Methods(http.MethodPost, http.MethodOptions)
	healthy := webapi.Untraced("rtc_healthz", func(*http.Request) util.JSONResponse {
		return util.JSONResponse{Code: http.StatusOK, JSON: struct{}{}}
	})
	router.Handle(path+"/healthz", healthy).Methods(http.MethodGet, http.MethodHead, http.MethodOptions)
}

// serviceAnswer is the answer of the requests for tokens.
type serviceAnswer struct {
	URL string `json:"url"`
	JWT string `json:"jwt"`
}

// answer does what a request asks for.
func (s *service) answer(req *http.Request, kind request) (answer any, err error) {
	if err = webapi.Limited(s.addresses.Wait(limits.ClientNetwork(req, s.cfg.RealIPHeader), time.Now())); err != nil {
		return nil, err
	}
	body, err := webapi.ReadBody(req.Body)
	if err != nil {
		return nil, err
	}
	f := serviceFields(body)
	openID, delayID, claimed := f.openID(), f.delayID(kind == delegate), ""
	m := member{slotID: callSlot}
	if kind == sfuGet {
		m.roomID, m.id = f.name("room"), f.name("device_id")
	} else {
		m.roomID, m.slotID, claimed = f.name("room_id"), f.name("slot_id"), f.name("member.claimed_user_id")
		m.id, m.deviceID = f.name("member.id"), f.name("member.claimed_device_id")
	}
	if f.err != nil {
		return nil, f.err
	}
	ctx := req.Context()
	user, err := s.userOf(ctx, openID, m.roomID)
	switch {
	case err != nil:
		return nil, err
	case claimed != "" && claimed != user.String():
		return nil, errOpenID
	}
	if m.userID = user.String(); kind == sfuGet {
		m.id = m.userID + ":" + m.id
	}
	if m.isAmbiguous() {
		f.fail(f.invalid(errMemberID.Err))
		return nil, f.err
	}
	if delayID != "" && !s.dendrite.IsLocalServerName(user.Domain()) {
		if kind == delegate {
			return nil, errRemoteDelegation
		}
		return nil, errRemoteDelay
	}
	if err = s.checkJoined(ctx, m); err != nil {
		return nil, err
	}
	answer = struct{}{}
	if kind != delegate {
		jwt, err := s.token(ctx, m, s.hasFullAccess(user.Domain()))
		if err != nil {
			return nil, err
		}
		answer = serviceAnswer{s.cfg.URL, jwt}
	}
	if delayID != "" {
		err = s.handOver(ctx, m, delayID, f.invalid)
	}
	return answer, err
}

// delayID returns the delay ID of a request, which is there together with the delay, or "". The delay itself is that of the event.
func (f *fields) delayID(required bool) string {
	if !required && !f.has("delay_id") && !f.has("delay_timeout") {
		return ""
	}
	if delay := f.object.Get("delay_timeout"); delay.Type != gjson.Number || delay.Num <= 0 {
		f.fail(f.wrong("delay_timeout must be a number of milliseconds"))
	}
	return f.name("delay_id")
}

// token returns a token. A user without full access gets it only for a room that is there.
func (s *service) token(ctx context.Context, m member, fullAccess bool) (string, error) {
	if fullAccess {
		return s.makeToken(ctx, m, true)
	}
	p := m.participant()
	_, err := s.parts.SFU.Room(ctx, p.Room)
	switch {
	case errors.Is(err, livekit.ErrNotFound):
		return "", errNoCall
	case err != nil:
		return "", fmt.Errorf("looking for a room: %w", err)
	}
	return s.sign(ctx, m, livekit.Grant{Participant: p})
}

// webhook takes a webhook of LiveKit. The answer is always the same, because LiveKit would repeat what is refused.
func (s *service) webhook(req *http.Request) util.JSONResponse {
	var event livekit.Event
	body, err := webapi.ReadBody(req.Body)
	if err == nil {
		event, err = s.parts.SFU.Hear(req.Header.Get("Authorization"), body)
	}
	switch {
	case err != nil:
		if s.complain.Wait(struct{}{}, time.Now()) == 0 {
			util.GetLogger(req.Context()).WithError(err).Warn("Ignored a webhook that is not of our LiveKit: is its key that of matrix_rtc.livekit?")
		}
	case s.parts.Hints != nil:
		s.parts.Hints.Hint(event)
	}
	return util.JSONResponse{Code: http.StatusOK, JSON: struct{}{}}
}
