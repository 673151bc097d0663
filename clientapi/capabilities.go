package clientapi

import (
	"encoding/json"
	"net/http"

	"github.com/matrix-org/dendrite/clientapi/routing"
	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/setup/config"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/util"
	"github.com/tidwall/sjson"
)

// delayedEvents is the capability of delayed events.
type delayedEvents struct {
	MaxDelayMS   int64 `json:"max_delay_ms"`
	MaxScheduled int   `json:"max_scheduled"`
}

// capabilitiesHandler answers GET /capabilities as Dendrite does, and adds the limits of delayed events. The rate limit is Dendrite's, but
// with a counter of its own.
func capabilitiesHandler(
	userAPI userapi.QueryAcccessTokenAPI, rsAPI api.ClientRoomserverAPI, rateLimiting *config.RateLimiting, cfg Config,
) http.Handler {
	limits := httputil.NewRateLimits(rateLimiting)
	return httputil.MakeAuthAPI("capabilities", userAPI, func(req *http.Request, device *userapi.Device) util.JSONResponse {
		if limited := limits.Limit(req, device); limited != nil {
			return *limited
		}
		res := routing.GetCapabilities(rsAPI)
		body, err := json.Marshal(res.JSON)
		if err != nil {
			return util.ErrorResponse(err)
		}
		own := delayedEvents{MaxDelayMS: cfg.MaxDelay.Milliseconds(), MaxScheduled: cfg.MaxScheduled}
		if device.AccountType == userapi.AccountTypeAppService && own.MaxScheduled > 0 {
			own.MaxScheduled = cfg.MaxScheduledOfService
		}
		for _, name := range []string{`m\.delayed_events`, `org\.matrix\.msc4140\.delayed_events`} {
			if body, err = sjson.SetBytes(body, "capabilities."+name, own); err != nil {
				return util.ErrorResponse(err)
			}
		}
		res.JSON = json.RawMessage(body)
		return res
	}, httputil.WithAllowGuests())
}
