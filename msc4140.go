// Package msc4140 adds MSC4140 to Dendrite, twice: expiring events (the draft of 2024) and delayed events (the merged text).
//
// A client marks an event with a lifetime and keeps it alive with a token. When the keep-alives stop, the homeserver sends a closing copy
// of the event. Or a client schedules an event to be sent later, and keeps postponing it. When that stops, the homeserver sends the event.
// One engine keeps the timers of both.
//
// This package only joins the other packages, which ARCHITECTURE.md lists. A Dendrite that wants the feature makes six calls, in this
// order:
//
//	cfg, err := config.Load(...)            // of the package config below this one
//	ext, err := msc4140.New(...)            // with the roomserver API, before any component of Dendrite gets it
//	rsAPI = ext.RoomserverAPI()             // to be used in its place from here on
//	monolith.UserAPI = ext.UserAPI(userAPI) // before Dendrite's routes are registered
//	ext.AddPublicRoutes(routers, userAPI,   // before Dendrite's own routes
//		msc4140.Federation{KeyRing: keyRing, Client: monolith.Client})
//	err = ext.Start()                       // when all components exist, before HTTP is served
package msc4140

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/roomserver/api"
	dendriteconfig "github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/dendrite/setup/jetstream"
	"github.com/matrix-org/dendrite/setup/process"
	dendriteuserapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/around"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/clientapi"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/config"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/dendritefix"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/inputqueue"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/roomserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/summary"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/syncapi"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/syncapi/delayid"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/syncapi/stateafter"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/userapi"
)

// healthTimeout is how long the health check waits for the database.
const healthTimeout = 2 * time.Second

// Extension is the feature, wired into one Dendrite.
type Extension struct {
	process  *process.ProcessContext
	store    io.Closer
	rsAPI    *roomserver.API
	accounts *userapi.Accounts
	quiet    *dendritefix.QuietRooms
	timers   *expiration.Timers
	client   *clientapi.API
	consumer *syncapi.Consumer
	sync     *stateafter.Route
	rooms    *summary.Summaries
	features []string // unstable features that /versions adds to Dendrite's
	calls    *rtc.Discovery
	backend  *backend // nil if this server makes no tokens of LiveKit
}

// Federation is what Dendrite uses to talk with other servers.
type Federation = rtc.Federation

// New opens the database and wires everything together. It starts nothing. It also repairs JetStream's consumers after a crash, which must
// happen before any component reads a stream.
func New(
	processCtx *process.ProcessContext, cfg *config.Config, dendriteCfg *dendriteconfig.Dendrite,
	cm *sqlutil.Connections, natsInstance *jetstream.NATSInstance, rsAPI api.RoomserverInternalAPI, enableMetrics bool,
) (*Extension, error) {
	store, err := storage.Open(processCtx.Context(), cm, &cfg.Database)
	if err != nil {
		return nil, fmt.Errorf("failed to open the database of expiring events: %w", err)
	}
	if err = dendritefix.KeepConnections(
		cm, &cfg.Database, &dendriteCfg.RoomServer.Database, &dendriteCfg.SyncAPI.Database, &dendriteCfg.UserAPI.AccountDatabase,
		&dendriteCfg.KeyServer.Database, &dendriteCfg.FederationAPI.Database,
	); err != nil {
		return nil, fmt.Errorf("failed to open a database of Dendrite's: %w", err)
	}
	tokens, err := expiration.NewTokens(dendriteCfg.Global.PrivateKey.Seed())
	if err != nil {
		return nil, fmt.Errorf("failed to derive the key of the refresh tokens: %w", err)
	}
	componentCfg, clientCfg, rtcCfg := cfg.Components()
	js, _ := natsInstance.Prepare(processCtx, &dendriteCfg.Global.JetStream)
	if err = dendritefix.ResetStrandedConsumers(processCtx.Context(), js, &dendriteCfg.Global.JetStream); err != nil {
		return nil, err
	}
	queues := inputqueue.New(processCtx.Context(), js, &dendriteCfg.Global.JetStream, rsAPI, dendriteCfg.Global.ServerName)
	output := roomserver.NewOutput(js, &dendriteCfg.Global.JetStream, syncapi.ConsumerName(&dendriteCfg.Global.JetStream))
	intake := roomserver.NewIntake(rsAPI, queues, output)
	quiet := dendritefix.NewQuietRooms(intake, queues)
	wrapper := roomserver.NewAPI(dendritefix.NewReady(quiet))
	accounts, err := userapi.NewAccounts(cm, &dendriteCfg.UserAPI.AccountDatabase, dendriteCfg.Global.ServerName)
	if err != nil {
		return nil, err
	}
	outbox := roomserver.NewCheckedOutbox(roomserver.NewOutbox(&dendriteCfg.ClientAPI, wrapper), accounts.Deactivated)
	componentCfg.Explain = clientapi.Explain
	timers := expiration.New(componentCfg, store, intake.Settling(outbox), tokens)
	wrapper.Watch(timers)
	ofClients := clientapi.Timers{Keeper: timers, Sender: timers, Scheduler: timers, Actor: timers, Finder: timers}
	var (
		callBackend *backend
		members     syncapi.Members
	)
	if l := cfg.MatrixRTC.LiveKit; l != nil {
		rooms := rtc.NewRooms(wrapper, dendriteCfg.Global.IsLocalServerName)
		callBackend = newBackend(l, *rtcCfg.Tokens, &dendriteCfg.Global, timers, store.Participants(), rooms)
		members, ofClients.Delegator = callBackend.keeper, callBackend.tokens
		if enableMetrics {
			prometheus.MustRegister(callBackend.keeper.Collectors()...)
		}
	}
	client := clientapi.New(clientCfg, &dendriteCfg.ClientAPI, wrapper, ofClients)
	if enableMetrics {
		prometheus.MustRegister(append(timers.Collectors(), client.Collectors()...)...)
	}
	stateAfter, err := stateafter.New(processCtx.Context(), cm, &dendriteCfg.SyncAPI.Database, wrapper)
	if err != nil {
		return nil, fmt.Errorf("failed to open the syncapi's database: %w", err)
	}
	features := unstableFeatures(cfg)
	calls := rtc.NewDiscovery(rtcCfg, features)
	return &Extension{
		process: processCtx, store: store, rsAPI: wrapper, accounts: accounts, quiet: quiet, timers: timers, client: client,
		consumer: syncapi.NewConsumer(&dendriteCfg.Global.JetStream, js, wrapper, timers, members),
		sync:     stateAfter,
		rooms:    summary.New(summary.Config{Limit: clientCfg.UnknownTokens, RealIPHeader: clientCfg.RealIPHeader}, &dendriteCfg.ClientAPI, wrapper),
		features: append(features, calls.Features()...),
		calls:    calls,
		backend:  callBackend,
	}, nil
}

// RoomserverAPI returns the roomserver API that all of Dendrite's components must get.
func (e *Extension) RoomserverAPI() api.RoomserverInternalAPI { return e.rsAPI }

// UserAPI returns the user API that Dendrite's client API must get in place of Dendrite's own.
func (e *Extension) UserAPI(userAPI dendriteuserapi.UserInternalAPI) dendriteuserapi.UserInternalAPI {
	return userapi.New(userAPI, e.accounts, e.timers.CancelAll)
}

// AddPublicRoutes registers the routes. Dendrite's own routes must be registered after them.
func (e *Extension) AddPublicRoutes(routers httputil.Routers, userAPI rtc.UserAPI, others Federation) {
	routers.Client.Use( // the first is the outermost
		dendritefix.RefuseUnfinishedSync, dendritefix.BoundDepth, dendritefix.RefuseNUL, delayid.Add(e.timers, userAPI), e.sync.Middleware(userAPI),
		around.Versions(e.features...),
	)
	e.client.AddRoutes(routers.Client, userAPI)
	e.calls.AddRoutes(routers, userAPI)
	if e.backend != nil {
		e.backend.tokens.AddRoutes(routers, userAPI, others)
	}
	e.rooms.AddRoutes(routers.Client, userAPI)
	routers.DendriteAdmin.HandleFunc("/monitor/health", e.health)
}

// unstableFeatures returns the unstable features that /versions adds to Dendrite's, without those of calls.
func unstableFeatures(cfg *config.Config) []string {
	features := []string{"org.matrix.msc4222"}
	if cfg.DelayedEvents.MaxScheduledPerUser > 0 {
		features = append(features, "org.matrix.msc4140", "org.matrix.msc4140.stable")
	}
	return features
}

// KeepAlivesFirst returns a handler that answers keep-alives itself and gives everything else to next, which serves the routers.
// Without it the routers answer keep-alives too, at a higher cost.
func (e *Extension) KeepAlivesFirst(next http.Handler) http.Handler {
	return e.client.KeepAlivesFirst(next)
}

// Start loads the timers, and starts to watch deadlines and the output stream. Both stop when Dendrite shuts down. Then the database's log
// is written back, so that its file can be copied.
func (e *Extension) Start() error {
	ctx := e.process.Context()
	if err := e.timers.Start(ctx); err != nil {
		return err
	}
	e.quiet.Start(ctx)
	if e.backend != nil {
		if err := e.backend.start(ctx); err != nil {
			return err
		}
	}
	e.process.ComponentStarted()
	go func() {
		defer e.process.ComponentFinished()
		<-e.process.WaitForShutdown()
		e.Stop()
		// The consumer may still be reading. It does not acknowledge a message whose effect it can no longer write, and gets that message
		// again after the next start.
		if err := e.store.Close(); err != nil {
			logrus.WithError(err).Warn("Failed to write back the log of the database of expiring events: copy it with the database")
		}
	}()
	if err := e.consumer.Start(ctx); err != nil {
		return fmt.Errorf("failed to start the output stream consumer of expiring events: %w", err)
	}
	return nil
}

// Stop stops the timers and waits for attempts in progress. Dendrite's shutdown calls it too. An earlier call leaves less work to the next
// start. It may be called twice.
func (e *Extension) Stop() {
	if e.backend != nil {
		e.backend.stop()
	}
	e.timers.Stop()
	e.quiet.Stop()
}

// health is Dendrite's health check with a check of our database. Our warning does not enter Dendrite's own list, because that list is
// never cleared and a database can recover. What is wrong with LiveKit does not change the status: whoever restarts a server that is not
// healthy would only add to the outage.
func (e *Extension) health(w http.ResponseWriter, req *http.Request) {
	_, warnings := e.process.IsDegraded()
	ctx, cancel := context.WithTimeout(req.Context(), healthTimeout)
	defer cancel()
	if err := e.timers.Ping(ctx); err != nil {
		logrus.WithError(err).Warn("Failed to reach, or to write, the database of expiring events")
		warnings = append(warnings, "expiration: cannot reach the database, or cannot write it")
	}
	var degraded []string
	if e.backend != nil {
		degraded = e.backend.degraded()
	}
	code := http.StatusOK
	if len(warnings) > 0 {
		code = http.StatusServiceUnavailable
	}
	w.WriteHeader(code)
	if len(warnings)+len(degraded) > 0 {
		_ = json.NewEncoder(w).Encode(struct {
			Warnings []string `json:"warnings,omitempty"`
			Degraded []string `json:"degraded,omitempty"`
		}{warnings, degraded})
	}
}
