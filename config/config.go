// Package config reads our sections of dendrite.yaml: defaults, checks, and which database is used. docs/configuration.md explains
// the keys to operators.
package config

import (
	"errors"
	"fmt"
	"os"
	"path"
	"reflect"
	"strings"
	"time"

	"github.com/matrix-org/dendrite/setup/config"
	"gopkg.in/yaml.v2"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/clientapi"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// Config is the section expiration of dendrite.yaml.
type Config struct {
	// Database is where the timers are kept. An empty connection string means the global database if that is PostgreSQL,
	// and else an SQLite file of our own, beside the roomserver's.
	Database config.DatabaseOptions `yaml:"database"`
	// MaxDuration is the longest duration that a client may ask for, from 1s to 8760h, in whole seconds. Default 24h.
	MaxDuration time.Duration `yaml:"max_duration"`
	// MaxRunningPerUser is how many expiring events of one user may run at the same time, from 1 to 1000000. Application
	// services are exempt. Default 100.
	MaxRunningPerUser int `yaml:"max_running_per_user"`
	// DelayedEvents limits delayed events.
	DelayedEvents DelayedEvents `yaml:"delayed_events"`
	// RestartGrace is for how long after a start no event expires, from 0s to 1h. Default 0s: what ran out while the
	// server was down expires at once.
	RestartGrace time.Duration `yaml:"restart_grace"`
	// RateLimiting limits the keep-alive endpoint.
	RateLimiting RateLimiting `yaml:"rate_limiting"`
	// MatrixRTC is a section of its own.
	MatrixRTC MatrixRTC `yaml:"-"`
}

// DelayedEvents is the section expiration.delayed_events.
type DelayedEvents struct {
	// MaxDelay is the longest delay that a client may ask for, from 1s to 8760h, in whole milliseconds. Default 24h.
	MaxDelay time.Duration `yaml:"max_delay"`
	// MaxScheduledPerUser is how many delayed events of one user may be scheduled at the same time, from 0 to
	// 1000000; 0 switches them off. Application services are exempt. Default 100.
	MaxScheduledPerUser int `yaml:"max_scheduled_per_user"`
	// KeepFinalised is for how long, from 1m to 8760h, and MaxFinalisedPerUser for how many of one user, from 1 to 10000, it
	// can be looked up what became of a delayed event. Default 168h and 1000.
	KeepFinalised       time.Duration `yaml:"keep_finalised"`
	MaxFinalisedPerUser int           `yaml:"max_finalised_per_user"`
}

// RateLimiting is the section expiration.rate_limiting.
type RateLimiting struct {
	// Enabled: default true.
	Enabled bool `yaml:"enabled"`
	// Token limits the keep-alives for one valid token. Default 20 in 1000 ms.
	Token RateLimit `yaml:"token"`
	// UnknownToken limits the requests with unknown tokens from one address. Default 20 in 1000 ms.
	UnknownToken RateLimit `yaml:"unknown_token"`
	// User limits the requests of one user that schedule delayed events, or look them up. Application services are exempt. Default 10
	// in 1000 ms.
	User RateLimit `yaml:"user"`
	// RealIPHeader is the header in which the reverse proxy names the client's address. Default: none, the address of the
	// connection counts.
	RealIPHeader string `yaml:"real_ip_header"`
}

// RateLimit has the keys and the meaning of Dendrite's client_api.rate_limiting.
type RateLimit struct {
	// Threshold is how many requests are allowed at once, from 1 to 1000000.
	Threshold int `yaml:"threshold"`
	// CooloffMS is the time in milliseconds, from 1 to 3600000, after which as many are allowed again.
	CooloffMS int64 `yaml:"cooloff_ms"`
}

const (
	// maxPerUser is the most that one user may be allowed of anything, and maxThreshold the most requests at once. With more, the
	// product with a factor of the component could overflow, and a request would cost less than the nanosecond that is the least that a
	// bucket can count.
	maxPerUser   = 1_000_000
	maxThreshold = 1_000_000
	// maxMaxFinalised is less, because a look-up without an ID reads all of them.
	maxMaxFinalised = 10_000
	minKeep         = time.Minute
	maxMaxDuration  = 365 * 24 * time.Hour
	maxRestartGrace = time.Hour
	maxCooloffMS    = int64(time.Hour / time.Millisecond)
	// maxConnections and maxLifetime bound the numbers of the database. PostgreSQL itself allows at most 262,143 connections.
	maxConnections = 10_000
	maxLifetime    = int64(maxMaxDuration / time.Second)
)

// Defaults sets every value as it is when the section is absent.
func (c *Config) Defaults() {
	*c = Config{
		MaxDuration:       24 * time.Hour,
		MaxRunningPerUser: 100,
		DelayedEvents: DelayedEvents{
			MaxDelay: 24 * time.Hour, MaxScheduledPerUser: 100, KeepFinalised: 7 * 24 * time.Hour, MaxFinalisedPerUser: 1000,
		},
		RateLimiting: RateLimiting{
			Enabled:      true,
			Token:        RateLimit{Threshold: 20, CooloffMS: 1000},
			UnknownToken: RateLimit{Threshold: 20, CooloffMS: 1000},
			User:         RateLimit{Threshold: 10, CooloffMS: 1000},
		},
	}
	c.Database.Defaults(10)
	c.Database.MaxIdleConnections = idleConnections
}

// idleConnections is how many connections the component uses at once under load: one for each kind of read and write, see
// batches in package expiration. With fewer of them kept, a mass expiry would open new ones all the time.
const idleConnections = 5

// bounds is which values a key allows: from least to most, in steps. Durations are in nanoseconds.
type bounds struct {
	key               string
	value             any // int, int64 or time.Duration
	least, most, step int64
	// allowed is the same for people.
	allowed string
}

// bounds returns the bounds of every number and every duration. docs/configuration.md has the same table, and a test holds the two
// against each other.
func (c *Config) bounds() []bounds {
	number := func(key string, value any, least, most int64) bounds {
		return bounds{key, value, least, most, 1, fmt.Sprintf("from %d to %d", least, most)}
	}
	duration := func(key string, value, least, most, step time.Duration, allowed string) bounds {
		return bounds{key, value, int64(least), int64(most), int64(step), allowed}
	}
	database, delayed, limits := &c.Database, &c.DelayedEvents, &c.RateLimiting
	return []bounds{
		number("database.max_open_conns", database.MaxOpenConnections, -1, maxConnections),
		number("database.max_idle_conns", database.MaxIdleConnections, -1, maxConnections),
		number("database.conn_max_lifetime", database.ConnMaxLifetimeSeconds, -1, maxLifetime),
		duration("max_duration", c.MaxDuration, time.Second, maxMaxDuration, time.Second, "whole seconds from 1s to 8760h"),
		number("max_running_per_user", c.MaxRunningPerUser, 1, maxPerUser),
		duration("delayed_events.max_delay", delayed.MaxDelay, time.Second, maxMaxDuration, time.Millisecond,
			"whole milliseconds from 1s to 8760h"),
		number("delayed_events.max_scheduled_per_user", delayed.MaxScheduledPerUser, 0, maxPerUser),
		duration("delayed_events.keep_finalised", delayed.KeepFinalised, minKeep, maxMaxDuration, 1, "from 1m to 8760h"),
		number("delayed_events.max_finalised_per_user", delayed.MaxFinalisedPerUser, 1, maxMaxFinalised),
		duration("restart_grace", c.RestartGrace, 0, maxRestartGrace, 1, "from 0s to 1h"),
		number("rate_limiting.token.threshold", limits.Token.Threshold, 1, maxThreshold),
		number("rate_limiting.token.cooloff_ms", limits.Token.CooloffMS, 1, maxCooloffMS),
		number("rate_limiting.unknown_token.threshold", limits.UnknownToken.Threshold, 1, maxThreshold),
		number("rate_limiting.unknown_token.cooloff_ms", limits.UnknownToken.CooloffMS, 1, maxCooloffMS),
		number("rate_limiting.user.threshold", limits.User.Threshold, 1, maxThreshold),
		number("rate_limiting.user.cooloff_ms", limits.User.CooloffMS, 1, maxCooloffMS),
	}
}

// Verify adds to configErrs what is impossible, naming the key.
func (c *Config) Verify(configErrs *config.ConfigErrors) {
	for _, b := range c.bounds() {
		if value := reflect.ValueOf(b.value).Int(); value < b.least || value > b.most || value%b.step != 0 {
			configErrs.Add(fmt.Sprintf("invalid value for config key %q: %v (must be %s)", "expiration."+b.key, b.value, b.allowed))
		}
	}
}

// resolveDatabase decides which database is used, given the rest of Dendrite's configuration.
func (c *Config) resolveDatabase(cfg *config.Dendrite) error {
	own, global := &c.Database, &cfg.Global.DatabaseOptions
	roomserver := &cfg.RoomServer.Database
	switch {
	case own.ConnectionString != "":
		if own.ConnectionString.IsSQLite() && sharesSQLite(own.ConnectionString, cfg) {
			return fmt.Errorf("config key %q: the SQLite file is another component's; this one needs its own",
				"expiration.database.connection_string")
		}
	case global.ConnectionString.IsPostgres() && global.ConnectionString != "":
		*own = config.DatabaseOptions{} // the connection manager takes the global one
	case global.ConnectionString != "":
		own.ConnectionString = besideSQLite(global.ConnectionString)
	case roomserver.ConnectionString.IsSQLite():
		own.ConnectionString = besideSQLite(roomserver.ConnectionString)
	default:
		*own = *roomserver
	}
	return nil
}

// sqliteFile is the name of our own database.
const sqliteFile = "dendrite_expiration.db"

// besideSQLite returns the database of our own in the folder of another SQLite file.
func besideSQLite(other config.DataSource) config.DataSource {
	dir, _ := path.Split(string(other))
	if dir == "" {
		dir = "file:"
	}
	return config.DataSource(dir + sqliteFile)
}

func sharesSQLite(own config.DataSource, cfg *config.Dendrite) bool {
	for _, other := range []config.DatabaseOptions{
		cfg.Global.DatabaseOptions, cfg.FederationAPI.Database, cfg.KeyServer.Database, cfg.MediaAPI.Database,
		cfg.RoomServer.Database, cfg.SyncAPI.Database, cfg.UserAPI.AccountDatabase, cfg.RelayAPI.Database, cfg.MSCs.Database,
	} {
		if other.ConnectionString == own {
			return true
		}
	}
	return false
}

// Load reads the section expiration out of the file that Dendrite has read the rest from. It is complete and
// verified when there is no error; the error names every bad key.
func Load(file string, cfg *config.Dendrite) (*Config, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	c, err := parseConfig(data)
	if err != nil {
		return nil, err
	}
	return c, c.resolveDatabase(cfg)
}

func parseConfig(data []byte) (*Config, error) {
	var root yaml.MapSlice
	if err := yaml.Unmarshal(data, &root); err != nil {
		return nil, err
	}
	c := &Config{}
	c.Defaults()
	if err := parseSection(root, "expiration", c); err != nil {
		return nil, err
	}
	if err := parseSection(root, "matrix_rtc", &c.MatrixRTC); err != nil {
		return nil, err
	}
	var errs config.ConfigErrors
	c.Verify(&errs)
	if c.MatrixRTC.Verify(&errs); len(errs) > 0 {
		return nil, errors.New(strings.Join(errs, "; "))
	}
	return c, nil
}

// parseSection reads one section, if it is there.
func parseSection[T any](root yaml.MapSlice, name string, into *T) error {
	var keys yaml.MapSlice
	for _, section := range root {
		if section.Key != name || section.Value == nil {
			continue
		}
		var ok bool
		if keys, ok = section.Value.(yaml.MapSlice); !ok {
			return fmt.Errorf("config key %q must be %s", name, kind(reflect.TypeFor[T]()))
		}
	}
	var errs config.ConfigErrors
	if checkKeys(&errs, name, keys, reflect.TypeFor[T]()); len(errs) > 0 {
		return errors.New(strings.Join(errs, "; "))
	}
	section, err := yaml.Marshal(keys)
	if err != nil {
		return err
	}
	if err = yaml.UnmarshalStrict(section, into); err != nil {
		return fmt.Errorf("config key %q: %w", name, err)
	}
	return nil
}

// checkKeys adds an error for each key that the section does not have, and for each value of a wrong kind. The YAML
// library would name Go types instead of the keys' places.
func checkKeys(errs *config.ConfigErrors, prefix string, section yaml.MapSlice, t reflect.Type) {
	for _, item := range section {
		key := fmt.Sprintf("%s.%v", prefix, item.Key)
		field, ok := fieldByKey(t, fmt.Sprint(item.Key))
		inner, isSection := item.Value.(yaml.MapSlice)
		list, isList := item.Value.([]any)
		switch {
		case !ok:
			errs.Add(fmt.Sprintf("unknown config key %q", key))
		case isSection && field.Type.Kind() == reflect.Struct:
			checkKeys(errs, key, inner, field.Type)
		case isList && field.Type.Kind() == reflect.Slice:
			for i, element := range list {
				place := fmt.Sprintf("%s[%d]", key, i)
				if inner, isSection = element.(yaml.MapSlice); isSection {
					checkKeys(errs, place, inner, field.Type.Elem())
				} else {
					errs.Add(fmt.Sprintf("config key %q must be %s", place, kind(field.Type.Elem())))
				}
			}
		default:
			data, err := yaml.Marshal(item.Value)
			if err == nil {
				err = yaml.Unmarshal(data, reflect.New(field.Type).Interface())
			}
			if err != nil {
				errs.Add(fmt.Sprintf("invalid value for config key %q: %v (must be %s)", key, item.Value, kind(field.Type)))
			}
		}
	}
}

// kind says what the values of a type look like.
func kind(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[time.Duration]():
		return "a duration, such as 90s or 24h"
	case t.Kind() == reflect.Struct:
		return "a section with keys of its own"
	case t.Kind() == reflect.Slice:
		return "a list of sections"
	case t.Kind() == reflect.Bool:
		return "true or false"
	case t.Kind() == reflect.String:
		return "text"
	}
	return "a whole number"
}

func fieldByKey(t reflect.Type, key string) (reflect.StructField, bool) {
	for i := range t.NumField() {
		if field := t.Field(i); field.Tag.Get("yaml") == key {
			return field, true
		}
	}
	return reflect.StructField{}, false
}

// Components returns what the component and its routes need of the configuration.
func (c *Config) Components() (expiration.Config, clientapi.Config) {
	limit := func(l RateLimit) expiration.RateLimit {
		if !c.RateLimiting.Enabled {
			return expiration.RateLimit{}
		}
		return expiration.RateLimit{Threshold: l.Threshold, Cooloff: time.Duration(l.CooloffMS) * time.Millisecond}
	}
	return expiration.Config{
			MaxRunningPerUser: c.MaxRunningPerUser, RestartGrace: c.RestartGrace,
			MaxScheduledPerUser: c.DelayedEvents.MaxScheduledPerUser,
			KeepFinalised:       c.DelayedEvents.KeepFinalised, MaxFinalisedPerUser: c.DelayedEvents.MaxFinalisedPerUser,
			TokenLimit: limit(c.RateLimiting.Token),
		},
		clientapi.Config{
			MaxDuration: c.MaxDuration, MaxDelay: c.DelayedEvents.MaxDelay, MaxScheduled: c.DelayedEvents.MaxScheduledPerUser,
			UnknownTokens: limit(c.RateLimiting.UnknownToken), RealIPHeader: c.RateLimiting.RealIPHeader,
			UserRequests: limit(c.RateLimiting.User),
		}
}
