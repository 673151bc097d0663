// Package config reads our sections of dendrite.yaml. It sets defaults, checks values and chooses the database. docs/configuration.md
// explains the keys to operators.
package config

import (
	"time"

	"github.com/matrix-org/dendrite/setup/config"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/clientapi"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc"
)

// Config is the section expiration of dendrite.yaml.
type Config struct {
	// Database is where the timers are kept. With an empty connection string it is the global database if that is PostgreSQL, and otherwise
	// an SQLite file of our own, beside the roomserver's.
	Database config.DatabaseOptions `yaml:"database"`
	// MaxDuration is the longest duration that a client may ask for, from 1s to 8760h, in whole seconds. Default 24h.
	MaxDuration Duration `yaml:"max_duration"`
	// MaxRunningPerUser is how many expiring events of one user may run at the same time, from 1 to 1000000. Application
	// services are exempt. Default 100.
	MaxRunningPerUser int `yaml:"max_running_per_user"`
	// DelayedEvents limits delayed events.
	DelayedEvents DelayedEvents `yaml:"delayed_events"`
	// RestartGrace is for how long after a start no event expires, from 0s to 1h. Default 0s: an event whose deadline passed while the
	// server was down expires at once.
	RestartGrace Duration `yaml:"restart_grace"`
	// RateLimiting limits keep-alives, and the requests and sends of delayed events.
	RateLimiting RateLimiting `yaml:"rate_limiting"`
	// MatrixRTC is a section of its own.
	MatrixRTC MatrixRTC `yaml:"-"`
}

// DelayedEvents is the section expiration.delayed_events.
type DelayedEvents struct {
	// MaxDelay is the longest delay that a client may ask for, from 1s to 8760h, in whole milliseconds. Default 24h.
	MaxDelay Duration `yaml:"max_delay"`
	// MaxScheduledPerUser is how many delayed events of one user may be scheduled at the same time, from 0 to 1000000; 0 switches them
	// off. Default 100. MaxScheduledPerServiceUser is the same for a user of an application service, from 1 to 1000000. Default 10000.
	MaxScheduledPerUser        int `yaml:"max_scheduled_per_user"`
	MaxScheduledPerServiceUser int `yaml:"max_scheduled_per_service_user"`
	// KeepFinalised is for how long the outcome of a delayed event can be looked up, from 1m to 8760h. Default 168h. MaxFinalisedPerUser is
	// for how many delayed events of one user this is possible, from 1 to 10000. Default 1000.
	KeepFinalised       Duration `yaml:"keep_finalised"`
	MaxFinalisedPerUser int      `yaml:"max_finalised_per_user"`
}

// RateLimiting is the section expiration.rate_limiting.
type RateLimiting struct {
	// Enabled: default true.
	Enabled bool `yaml:"enabled"`
	// Token limits the keep-alives for one token, and the actions on one delayed event without an access token. Default 20 in 1000 ms.
	Token RateLimit `yaml:"token"`
	// UnknownToken limits the requests with unknown tokens or delay IDs from one address and, each counted apart, room summaries, the requests
	// for tokens of LiveKit with OpenID tokens, and those of one other server. Default 20 in 1000 ms.
	UnknownToken RateLimit `yaml:"unknown_token"`
	// User limits four kinds of requests of one user, each with a counter of its own: those that schedule or look up delayed events, those
	// that act on them with an access token, those for the transports of calls, and those for tokens of LiveKit. Application services are
	// exempt. Default 10 in 1000 ms.
	User RateLimit `yaml:"user"`
	// Due limits the delayed events of one user that are sent when they are due. Those above the limit are never sent. Application services
	// are exempt. Default 100 in 10000 ms.
	Due RateLimit `yaml:"due"`
	// RealIPHeader is the header in which the reverse proxy names the client's address. Default: none, and the address of the connection
	// counts.
	RealIPHeader string `yaml:"real_ip_header"`
}

// RateLimit has the keys and the meaning of Dendrite's client_api.rate_limiting.
type RateLimit struct {
	// Threshold is how many requests are allowed at once, from 1 to 1000000.
	Threshold int `yaml:"threshold"`
	// CooloffMS is the time in milliseconds, from 1 to 3600000, after which the full threshold is allowed again.
	CooloffMS int64 `yaml:"cooloff_ms"`
}

// Defaults sets every value to what it is when the section is absent.
func (c *Config) Defaults() {
	*c = Config{
		MaxDuration:       Duration(24 * time.Hour),
		MaxRunningPerUser: 100,
		DelayedEvents: DelayedEvents{
			MaxDelay: Duration(24 * time.Hour), MaxScheduledPerUser: 100, MaxScheduledPerServiceUser: 10_000,
			KeepFinalised: Duration(7 * 24 * time.Hour), MaxFinalisedPerUser: 1000,
		},
		RateLimiting: RateLimiting{
			Enabled:      true,
			Token:        RateLimit{Threshold: 20, CooloffMS: 1000},
			UnknownToken: RateLimit{Threshold: 20, CooloffMS: 1000},
			User:         RateLimit{Threshold: 10, CooloffMS: 1000},
			Due:          RateLimit{Threshold: 100, CooloffMS: 10_000},
		},
	}
	c.Database.Defaults(10)
	c.Database.MaxIdleConnections = idleConnections
}

// idleConnections is how many connections the engine uses at once under load: about one for each kind of read and write, see the batches in
// expiration.Timers. With fewer idle connections, a mass expiry would open new ones all the time.
const idleConnections = 5

// Components returns the configuration of the engine, of its HTTP routes, and of the transports of calls.
func (c *Config) Components() (expiration.Config, clientapi.Config, rtc.Config) {
	limit := func(l RateLimit) expiration.RateLimit {
		if !c.RateLimiting.Enabled {
			return expiration.RateLimit{}
		}
		return expiration.RateLimit{Threshold: l.Threshold, Cooloff: time.Duration(l.CooloffMS) * time.Millisecond}
	}
	return expiration.Config{
			MaxRunningPerUser: c.MaxRunningPerUser, RestartGrace: time.Duration(c.RestartGrace),
			MaxScheduledPerUser: c.DelayedEvents.MaxScheduledPerUser, MaxScheduledPerServiceUser: c.DelayedEvents.MaxScheduledPerServiceUser,
			KeepFinalised: time.Duration(c.DelayedEvents.KeepFinalised), MaxFinalisedPerUser: c.DelayedEvents.MaxFinalisedPerUser,
			TokenLimit: limit(c.RateLimiting.Token), DueLimit: limit(c.RateLimiting.Due),
		},
		clientapi.Config{
			MaxDuration: time.Duration(c.MaxDuration), MaxDelay: time.Duration(c.DelayedEvents.MaxDelay),
			MaxScheduled: c.DelayedEvents.MaxScheduledPerUser, MaxScheduledOfService: c.DelayedEvents.MaxScheduledPerServiceUser,
			DelayIDs:      limit(c.RateLimiting.Token),
			UnknownTokens: limit(c.RateLimiting.UnknownToken), RealIPHeader: c.RateLimiting.RealIPHeader,
			UserRequests: limit(c.RateLimiting.User),
		},
		rtc.Config{
			Transports: c.MatrixRTC.announced(), UserRequests: limit(c.RateLimiting.User),
			Tokens: c.MatrixRTC.tokens(limit(c.RateLimiting.User), limit(c.RateLimiting.UnknownToken), c.RateLimiting.RealIPHeader),
		}
}
